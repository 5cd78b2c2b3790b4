"""A compiled kernel of Triton's, launched without what Triton's own Python does again at every launch.

`compiled[grid](*args)` finds the stream, walks its hooks, builds the descriptor of every tile copy anew and asks the
driver about every pointer. That takes several times what the launch itself does. `direct` looks all that up once, for
the launchers it knows (those of Triton 3.6 to 3.9 on CUDA); a kernel it does not know keeps Triton's way.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs

_MOST_MAPS = 20_000  # of one descriptor: every address and shape makes another

# Parameters of the launcher's call after the grid, the stream and the function.
_HOOKS_APART = ("args",)  # Triton 3.6
_HOOKS_NAMED = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args")  # Triton 3.9

Launch = Callable[[tuple[int, int, int], int, list[Any]], None]


def direct(compiled: Any, constants: Sequence[Any]) -> Launch | None:
    """`launch(grid, stream, args)` of a compiled kernel, or None if its launcher is another.

    args: the run-time arguments, pointers as integers, descriptors as they are; constants: those that follow them.
    """
    run = compiled.run
    if type(run).__name__ != "CudaLauncher" or getattr(run, "gsan_enabled", False):
        return None
    if any(getattr(run, name, 1) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    c_launch, maps = _without_descriptors(run, compiled)
    if c_launch is None:
        return None
    how = tuple(inspect.signature(type(run).__call__).parameters)[6:]
    function, flags, packed = compiled.function, (run.launch_cooperative_grid, run.launch_pdl), compiled.packed_metadata
    end = list(constants)
    where: list[int] = []
    if how == _HOOKS_APART:

        def launch(grid: tuple[int, int, int], stream: int, args: list[Any]) -> None:
            values = _flat(args, maps, where) + end
            c_launch(*grid, stream, function, *flags, None, None, packed, None, None, None, *values)

        return launch
    if how == _HOOKS_NAMED:
        annotations, signature = run.arg_annotations, run.kernel_signature

        def launch(grid: tuple[int, int, int], stream: int, args: list[Any]) -> None:
            values = tuple(_flat(args, maps, where) + end)
            c_launch(
                *grid, stream, function, *flags, packed, None, None, None, None, None, annotations, signature, values
            )

        return launch
    return None


def hooked() -> bool:
    """Whether somebody (a profiler of Triton's) wants to know of launches; `direct` does not tell."""
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)) or bool(
        getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


class _Maps:
    """Descriptors of one argument as the driver wants them, by address and shape."""

    def __init__(self, meta: dict[str, Any], fill: Callable[..., Any], element: int):
        self.meta, self.fill, self.element = meta, fill, element
        self.known: dict[tuple, list[Any]] = {}

    def of(self, descriptor: Any) -> list[Any]:
        shape, strides = descriptor.shape, descriptor.strides
        key = (descriptor.base.data_ptr(), *shape, *strides)
        made = self.known.get(key)
        if made is None:
            meta = self.meta
            tiles = self.fill(
                key[0], meta["swizzle"], meta["elem_size"], self.element, meta["block_size"], shape, strides, 0
            )
            if len(self.known) >= _MOST_MAPS:
                self.known.clear()
            made = self.known[key] = [tiles, *shape, *strides]
        return made


def _flat(args: list[Any], maps: list[_Maps], where: list[int]) -> list[Any]:
    """The arguments, with what the driver wants in place of descriptors; the first call finds out `where` they are."""
    if not maps:
        return args
    if not where:
        where[:] = [i for i, arg in enumerate(args) if hasattr(arg, "base")]  # at once: others may launch it, too
    values: list[Any] = []
    start = 0
    for i, place in enumerate(where):
        values += args[start:place]
        values += maps[i].of(args[place])
        start = place + 1
    return values + args[start:]


def _without_descriptors(run: Any, compiled: Any) -> tuple[Any, list[_Maps]]:
    """The C function below the part of the launcher that makes descriptors, and what makes them instead."""
    launch = run.launch
    if not inspect.isfunction(launch):
        return launch, []
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    if not metas or "launcher" not in cells or any(m is None or m["fp4_padded"] or m.get("is_im2col") for m in metas):
        return None, []
    from triton.backends.nvidia import driver
    from triton.runtime import driver as runtime

    utils = runtime.active.utils
    fill = getattr(utils, "fill_tma_descriptor", None) or getattr(utils, "fill_tma_descriptor_tiled", None)
    if fill is None:
        return None, []
    kinds = driver.TMA_DTYPE_DEVICE_TO_HOST
    return cells["launcher"].cell_contents, [_Maps(meta, fill, kinds[meta["elem_type"]]) for meta in metas]
