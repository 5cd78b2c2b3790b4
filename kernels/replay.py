"""Doing again what an op did for arguments of the same kind: the same launches, on other memory.

What prepares a launch (checks, tiles, descriptors of tile copies, the search for the compiled variant) takes several
times what the launch does, and on a fast GPU the host falls behind. Once for each kind of arguments (their shapes,
strides, dtypes, devices, alignment, and everything that is no tensor), the tensors that an op makes and its launches
are recorded, addresses as offsets into an argument or into what the op made. A recording is used once a repetition has
given the bits of the op itself, which every op here gives from run to run.

Not recorded is a call that does anything but make tensors, look at them and launch, or whose launches read memory that
is neither an argument's nor its own, or where two arguments begin. DIROTQ_REPLAY=0 turns all of it off.
"""

import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backend import implementation
from .launched import taking_notes

ENVIRONMENT = "DIROTQ_REPLAY"
_MOST = 10_000  # kinds of arguments
_ATTEMPTS = 4  # the first one or two compile
_REFERENCE = f"{__package__}.reference"  # runs where there may be no Triton

_enabled = os.environ.get(ENVIRONMENT, "1") != "0"
# By kind: a recording, or how often it was tried in vain.
_known: dict[tuple, Any] = {}
_recording = threading.Lock()  # PyTorch keeps in one place for all threads that there is a dispatch mode


def enable(on: bool) -> None:
    """Turn recordings on or off, and forget those there are."""
    global _enabled
    _enabled = on
    _known.clear()


def call(check: Callable[..., None], op: str, block: int, args: Sequence[Any], extra: Any = None) -> Any:
    """`implementation` of `op` on `args`, after `check`; the first tensor's device decides.

    block: of the Hadamard matrix. extra: whatever else decides what the op does, such as where its arguments lie.
    """
    if not isinstance(args[0], Tensor) and not args[0]:
        check(*args)  # which refuses an empty list
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    compute = implementation(op, first.device, block)
    if not _enabled or not _launches(first) or compute.__module__ == _REFERENCE:
        check(*args)
        return compute(*args)
    tensors, kind = _kind(args)
    key = (compute, extra, *kind)
    known = _known.get(key)
    hooked = _launching()[0]()  # by a profiler of Triton's, which hears of Triton's own launches alone
    if type(known) is Recording and known.proven and not hooked:
        return known.repeat(tensors)
    check(*args)
    if hooked:
        return compute(*args)
    if type(known) is Recording:
        return _prove(key, known, tensors, compute, args)
    attempts = known or 0
    if attempts >= _ATTEMPTS or not _recording.acquire(blocking=False):
        return compute(*args)
    try:
        result, recording = _record(compute, args, tensors)
    finally:
        _recording.release()
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = attempts + 1 if recording is None else recording
    return result


@cache
def _launching() -> tuple[Callable[..., Any], ...]:
    """What is imported with Triton only: whether hooks wait for launches, a tensor's device as the current one, and
    its stream."""
    from . import launch, triton_launcher

    return triton_launcher.hooked, launch.on_device_of, launch.stream_of


def _launches(tensor: Tensor) -> bool:
    """Whether ops on the tensor's device are launches."""
    return tensor.is_cuda and torch.version.hip is None  # for ROCm, Triton's launcher is another


def _kind(args: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """All tensors among the arguments, and what they and the rest are like."""
    tensors: list[Tensor] = []
    kind: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            kind += (arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & 15, arg.get_device())
        elif isinstance(arg, list | tuple):
            kind.append(len(arg))
            if arg and isinstance(arg[0], Tensor):
                for each in arg:
                    tensors.append(each)
                    kind += (each.dtype, each.shape, each.stride(), each.data_ptr() & 15, each.get_device())
            else:
                kind += arg
        else:
            kind.append(arg)
    return tensors, kind


class _Made(NamedTuple):
    """A tensor that the op makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Tile:
    """In place of a descriptor of tile copies: what `triton_launcher` reads of one."""

    __slots__ = ("address", "shape", "strides")

    def __init__(self, address: int, shape: list[int], strides: list[int]):
        self.address, self.shape, self.strides = address, shape, strides

    @property
    def base(self) -> "_Tile":
        return self

    def data_ptr(self) -> int:
        return self.address


class _Step(NamedTuple):
    """A launch. fills: index of a value, of the tensor it points into and the offset there, and, of a descriptor, its
    shape and strides."""

    variant: Callable[..., None]
    grid: tuple[int, ...]
    values: list[Any]
    fills: list[tuple[int, int, int, tuple | None]]


class Recording:
    """What an op did, on tensors numbered from its arguments to those it made."""

    def __init__(self, made: list[_Made], steps: list[_Step], outputs: list[tuple], single: bool):
        self.made, self.steps, self.outputs, self.single = made, steps, outputs, single
        self.proven = False
        self.failures = 0

    def repeat(self, tensors: list[Tensor]) -> Any:
        _, on_device_of, stream_of = _launching()
        with on_device_of(tensors[0]):
            made = [torch.empty_strided(m.size, m.stride, dtype=m.dtype, device=m.device) for m in self.made]
            everything = tensors + made
            at = [tensor.data_ptr() for tensor in everything]
            stream = stream_of(tensors[0])
            for variant, grid, template, fills in self.steps:
                values = template.copy()
                for i, which, offset, tile in fills:
                    values[i] = at[which] + offset if tile is None else _Tile(at[which] + offset, *tile)
                variant(grid, stream, values)
        results = tuple(
            everything[which] if view is None else everything[which].as_strided(*view) for which, view in self.outputs
        )
        return results[0] if self.single else results


class _Watch(TorchDispatchMode):
    """Notes the tensors that PyTorch makes, and whether it does anything else but look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::empty_like"):
            self.made.append(out)
        elif not _looks(func, (args, kwargs), out):
            self.more = True
        return out


def _looks(func: Any, given: Any, out: Any) -> bool:
    """Whether all that an operator returns lies in what it was given, unchanged."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return False
    results = tree_leaves(out)
    if not results or not all(isinstance(result, Tensor) for result in results):
        return False
    places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    return all(result.untyped_storage().data_ptr() in places for result in results)


def _record(compute: Callable[..., Any], args: Sequence[Any], tensors: list[Tensor]) -> tuple[Any, Recording | None]:
    """The op's result, and a recording if it can be recorded."""
    with _Watch() as watch, taking_notes() as notes:
        result = compute(*args)
    if watch.more:
        return result, None
    everything = tensors + watch.made
    steps = []
    for note in notes:
        step = None if note is None else _step(*note, everything)
        if step is None:
            return result, None
        steps.append(step)
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    outputs = [_output(each, everything, len(tensors)) for each in results]
    if not steps or any(output is None for output in outputs):
        return result, None
    made = [_Made(tuple(t.shape), t.stride(), t.dtype, t.device) for t in watch.made]
    return result, Recording(made, steps, [o for o in outputs if o is not None], isinstance(result, Tensor))


def _step(variant: Any, grid: tuple[int, ...], arguments: Sequence[Any], everything: list[Tensor]) -> _Step | None:
    values: list[Any] = []
    fills: list[tuple[int, int, int, tuple | None]] = []
    for i, argument in enumerate(arguments):
        base = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
        if base is None or not base.data_ptr():
            values.append(0 if isinstance(argument, Tensor) else argument)
            continue
        place = _place(base.data_ptr(), everything)
        if place is None:
            return None
        tile = None if base is argument else (list(argument.shape), list(argument.strides))
        values.append(None)
        fills.append((i, *place, tile))
    return _Step(variant, grid, values, fills)


def _place(address: int, everything: list[Tensor]) -> tuple[int, int] | None:
    """Of an address: the tensor and the offset there, in bytes; None unless it is that of exactly one."""
    starts = [i for i, tensor in enumerate(everything) if tensor.data_ptr() == address and tensor.numel()]
    inside = starts or [i for i, tensor in enumerate(everything) if 0 < address - tensor.data_ptr() < _bytes(tensor)]
    return (inside[0], address - everything[inside[0]].data_ptr()) if len(inside) == 1 else None


def _bytes(tensor: Tensor) -> int:
    """From the first element to the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _output(result: Tensor, everything: list[Tensor], arguments: int) -> tuple[int, tuple | None] | None:
    """Which of the tensors made a result is, and how it is viewed unless as it was made."""
    for i, tensor in enumerate(everything[arguments:], arguments):
        if tensor.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() and tensor.dtype == result.dtype:
            if result.shape == tensor.shape and result.stride() == tensor.stride():
                return i, None
            return i, (tuple(result.shape), result.stride(), result.storage_offset())
    return None


def _prove(
    key: tuple, recording: Recording, tensors: list[Tensor], compute: Callable[..., Any], args: Sequence[Any]
) -> Any:
    """The op's result. The recording is proven if its own has the same bits, and given up if not."""
    result = compute(*args)
    if not _may_wait(tensors[0]):
        return result  # another time
    try:
        again = recording.repeat(tensors)
        pairs = [(result, again)] if recording.single else list(zip(result, again, strict=True))
        recording.proven = all(_same_bits(a, b) for a, b in pairs)
    except torch.OutOfMemoryError:  # another time, but not for ever
        recording.failures += 1
        if recording.failures < _ATTEMPTS:
            return result
    if not recording.proven:
        _known[key] = _ATTEMPTS
    return result


def _may_wait(tensor: Tensor) -> bool:
    """Whether the host may wait for the tensor's GPU: no graph is captured, and nobody looks for such waits."""
    if not tensor.is_cuda:
        return True
    with _launching()[1](tensor):
        return not torch.cuda.is_current_stream_capturing() and not torch.cuda.get_sync_debug_mode()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
