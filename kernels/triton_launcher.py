"""A compiled kernel of Triton's, launched without what Triton's own Python does again at every launch.

`compiled[grid](*args)` finds the stream, walks its hooks, builds the descriptor of every tile copy anew and asks the
driver about every pointer. That takes several times what the launch itself does. `direct` looks all that up once, for
the launchers it knows (those of Triton 3.6 to 3.9 on CUDA); a kernel it does not know keeps Triton's way.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs

from .launched import Place

_MOST_MAPS = 20_000  # of one descriptor: every address and shape makes another

# Parameters of the launcher's call after the grid, the stream and the function.
_HOOKS_APART = ("args",)  # Triton 3.6
_HOOKS_NAMED = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args")  # Triton 3.9


class _Maps:
    """Descriptors of one argument as the driver wants them, by shape and strides, then by address."""

    def __init__(self, meta: dict[str, Any], fill: Callable[..., Any], element: int):
        self.meta, self.fill, self.element = meta, fill, element
        self.known: dict[tuple, dict[int, Any]] = {}
        self.made = 0

    def of(self, address: int, shape: list[int], strides: list[int]) -> Any:
        known = self.known.get((*shape, *strides))
        tile = None if known is None else known.get(address)
        return self.for_tile(shape, strides)[1](address) if tile is None else tile

    def for_tile(self, shape: list[int], strides: list[int]) -> tuple[dict[int, Any], Callable[[int], Any]]:
        """Those known for a shape and strides by address, and what makes another and keeps it there."""
        key, meta = (*shape, *strides), self.meta
        known = self.known.setdefault(key, {})

        def make(address: int) -> Any:
            tile = self.fill(
                address, meta["swizzle"], meta["elem_size"], self.element, meta["block_size"], shape, strides, 0
            )
            if self.made >= _MOST_MAPS:
                self._forget()
            self.made += 1
            known[address] = tile
            self.known[key] = known  # a repeated launch has it, when all others have forgotten it
            return tile

        return known, make

    def _forget(self) -> None:
        self.made = 0
        everything = list(self.known.values())  # at once: other threads add to it
        self.known.clear()
        for of_a_tile in everything:
            of_a_tile.clear()


class Direct:
    """A compiled variant and what its launcher's C function is called with, beside the grid, the stream and arguments.

    maps: of its descriptors, in order. constants: what follows the run-time arguments. nested: whether the arguments
    come as one tuple.
    """

    def __init__(
        self, c_launch: Callable[..., None], begin: Sequence[Any], maps: list[_Maps], constants: Sequence[Any],
        nested: bool,
    ):  # fmt: skip
        self.begin, self.maps, self.constants = list(begin), maps, list(constants)
        self.c_launch = _nesting(c_launch, 4 + len(self.begin)) if nested else c_launch
        self.where: list[int] = []  # descriptors are among the arguments

    def __call__(self, grid: tuple[int, ...], stream: int, args: list[Any]) -> None:
        """args: the run-time arguments, pointers as integers, descriptors as they are."""
        self.c_launch(*grid, stream, *self.begin, *self._flat(args), *self.constants)

    def _flat(self, args: list[Any]) -> list[Any]:
        """The arguments, with what the driver wants in place of descriptors; the first call finds where those are."""
        if not self.maps:
            return args
        if not self.where:
            self.where[:] = [i for i, arg in enumerate(args) if hasattr(arg, "base")]  # at once, for other threads
        values: list[Any] = []
        start = 0
        for i, place in enumerate(self.where):
            tile = args[place]
            shape, strides = tile.shape, tile.strides
            values += args[start:place]
            values += (self.maps[i].of(tile.base.data_ptr(), shape, strides), *shape, *strides)
            start = place + 1
        return values + args[start:]

    def again(self, grid: tuple[int, ...], args: Sequence[Any]) -> "Again":
        """This launch, to be repeated on other memory: args are as before, but for a `Place` wherever memory is."""
        line = [*grid, 0, *self.begin]
        pointers: list[tuple[int, int, int]] = []
        tiles: list[tuple[int, int, int, dict[int, Any], Callable[[int], Any]]] = []
        for arg in args:
            if not isinstance(arg, Place):
                line.append(arg)
            elif arg.tile is None:
                pointers.append((len(line), arg.tensor, arg.offset))
                line.append(0)
            else:
                shape, strides = arg.tile
                known, make = self.maps[len(tiles)].for_tile(shape, strides)
                tiles.append((len(line), arg.tensor, arg.offset, known, make))
                line += (None, *shape, *strides)
        return Again(self.c_launch, [*line, *self.constants], pointers, tiles)


class Again:
    """A launch repeated wherever its tensors are, with nothing left to find out."""

    __slots__ = ("c_launch", "line", "pointers", "tiles")

    def __init__(self, c_launch: Callable[..., None], line: list[Any], pointers: list, tiles: list):
        self.c_launch, self.line, self.pointers, self.tiles = c_launch, line, pointers, tiles

    def __call__(self, stream: int, at: Sequence[int]) -> None:
        """at: the addresses of the tensors."""
        line = self.line.copy()
        line[3] = stream
        for i, tensor, offset in self.pointers:
            line[i] = at[tensor] + offset
        for i, tensor, offset, known, make in self.tiles:
            address = at[tensor] + offset
            tile = known.get(address)
            line[i] = make(address) if tile is None else tile
        self.c_launch(*line)


def _nesting(c_launch: Callable[..., None], begin: int) -> Callable[..., None]:
    return lambda *line: c_launch(*line[:begin], line[begin:])


def direct(compiled: Any, constants: Sequence[Any]) -> Direct | None:
    """How to launch a compiled kernel, or None if its launcher is another. constants: those after the arguments."""
    run = compiled.run
    if type(run).__name__ != "CudaLauncher" or getattr(run, "gsan_enabled", False):
        return None
    if any(getattr(run, name, 1) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    c_launch, maps = _without_descriptors(run, compiled)
    if c_launch is None:
        return None
    how = tuple(inspect.signature(type(run).__call__).parameters)[6:]
    begin = [compiled.function, run.launch_cooperative_grid, run.launch_pdl]
    packed = compiled.packed_metadata
    if how == _HOOKS_APART:
        return Direct(c_launch, [*begin, None, None, packed, None, None, None], maps, constants, nested=False)
    if how == _HOOKS_NAMED:
        more = [packed, None, None, None, None, None, run.arg_annotations, run.kernel_signature]
        return Direct(c_launch, [*begin, *more], maps, constants, nested=True)
    return None


def hooked() -> bool:
    """Whether somebody (a profiler of Triton's) wants to know of launches; `direct` does not tell."""
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)) or bool(
        getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


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
