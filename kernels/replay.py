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
from functools import cache, partial, reduce
from itertools import accumulate, chain
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import rehearsal
from .backend import implementation
from .launched import Place, taking_notes
from .observers import observed

ENVIRONMENT = "DIROTQ_REPLAY"
_MOST = 10_000  # kinds of arguments
_LOOKS = attrgetter("dtype", "shape")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # no subclass that stands for something else
_ATTEMPTS = 4  # the first one or two compile
_APART = 512  # bytes, as PyTorch lays tensors
_REFERENCE = f"{__package__}.reference"  # runs where there may be no Triton

Extra = Callable[[Sequence[Any]], Any] | None

_enabled = os.environ.get(ENVIRONMENT, "1") != "0"
# By kind: a recording, or how often it was tried in vain.
_known: dict[tuple, Any] = {}
_repeating: set[str] = set()  # ops with a recording that was proven
_recording = threading.Lock()  # PyTorch keeps in one place for all threads that there is a dispatch mode


def enable(on: bool) -> None:
    """Turn recordings on or off, and forget those there are."""
    global _enabled
    _enabled = on
    _known.clear()
    _repeating.clear()


def op(name: str, block: int, args: Sequence[Any], extra: Extra = None) -> Any:
    """The op `name` of PyTorch's namespace `dirotq` on `args`: a repetition, if nobody misses the call itself.

    block and extra: as in `call`.
    """
    if not torch.compiler.is_compiling() and name in _repeating and not observed():
        result = _repeated(name, block, args, extra)
        if result is not None:
            return result
    return getattr(torch.ops.dirotq, name).default(*[list(arg) if isinstance(arg, tuple) else arg for arg in args])


def _repeated(name: str, block: int, args: Sequence[Any], extra: Extra) -> Any:
    """The repetition of a recording, or None: all else, and all that is wrong, is for the op."""
    try:
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        if type(first) not in _PLAIN or not _launches(first):
            return None
        tensors, at, key = _kind(implementation(name, first.device, block), args, extra)
        known = _known.get(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None
    if type(known) is not Recording or not known.proven or _launching()[0]():
        return None
    if not _PLAIN.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None  # the dispatcher unwraps such tensors, and negates those
    return known.repeat(tensors, at)


def call(check: Callable[..., None], name: str, block: int, args: Sequence[Any], extra: Extra = None) -> Any:
    """What the op `name` does: its `implementation` on `args`, after `check`; the first tensor's device decides.

    block: of the Hadamard matrix. extra: finds whatever else decides what the op does, such as where its arguments lie.
    """
    if not isinstance(args[0], Tensor) and not args[0]:
        check(*args)  # which refuses an empty list
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    compute = implementation(name, first.device, block)
    if not _enabled or not _launches(first) or compute.__module__ == _REFERENCE:
        check(*args)
        return compute(*args)
    tensors, at, key = _kind(compute, args, extra)
    known = _known.get(key)
    hooked = _launching()[0]()  # by a profiler of Triton's, which hears of Triton's own launches alone
    if type(known) is Recording and known.proven and not hooked:
        return known.repeat(tensors, at)
    check(*args)
    if hooked or rehearsal.current() is not None:
        return compute(*args)
    if type(known) is Recording:
        return _prove(name, key, known, tensors, at, compute, args)
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


def _kind(compute: Callable[..., Any], args: Sequence[Any], extra: Extra) -> tuple[list[Tensor], list[int], tuple]:
    """All tensors among the arguments, their addresses, and the key of a recording: what they and the rest are like."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            rest.append(Tensor)
        elif isinstance(arg, list | tuple):
            rest.append(len(arg))
            if arg and isinstance(arg[0], Tensor):
                tensors += arg
                rest.append(Tensor)
            else:
                rest += arg
        else:
            rest.append(arg)
    at = list(map(Tensor.data_ptr, tensors))
    aligned = not reduce(or_, at, 0) & 15
    looks = map(_LOOKS, tensors), map(Tensor.stride, tensors), map(Tensor.get_device, tensors)
    more = None if extra is None else extra(args)
    return tensors, at, (compute, more, *rest, *chain(*looks), aligned or tuple(address & 15 for address in at))


class Recording:
    """What an op did, on tensors numbered from its arguments to those it made.

    made: makes each tensor that is returned. scratch: makes memory for all others, which begin at `offsets` there.
    """

    def __init__(
        self, made: Sequence[Callable[[], Tensor]], scratch: Callable[[], Tensor] | None, offsets: list[int],
        steps: list[Any], outputs: list[tuple[int, tuple | None]], single: bool,
    ):  # fmt: skip
        self.made, self.scratch, self.offsets = made, scratch, offsets
        self.steps, self.outputs, self.single = steps, outputs, single
        self.proven = False
        self.failures = 0

    def repeat(self, tensors: list[Tensor], at: list[int]) -> Any:
        """at: the addresses of the tensors; those of the others are added."""
        _, on_device_of, stream_of = _launching()
        with on_device_of(tensors[0]):
            made = [make() for make in self.made]
            for tensor in made:
                at.append(tensor.data_ptr())
            if self.scratch is not None:
                scratch = self.scratch()
                begin = scratch.data_ptr()
                for offset in self.offsets:
                    at.append(begin + offset)
            stream = stream_of(tensors[0])
            for step in self.steps:
                step(stream, at)
        if self.single:
            return _viewed(made, *self.outputs[0])
        return tuple([_viewed(made, *output) for output in self.outputs])


def _viewed(made: list[Tensor], which: int, view: tuple | None) -> Tensor:
    return made[which] if view is None else made[which].as_strided(*view)


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
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    kept = {each.untyped_storage().data_ptr() for each in results}
    returned = [tensor for tensor in watch.made if tensor.untyped_storage().data_ptr() in kept]
    others = [tensor for tensor in watch.made if tensor.untyped_storage().data_ptr() not in kept]
    everything = [*tensors, *returned, *others]
    steps = []
    for note in notes:
        step = None if note is None else _step(*note, everything)
        if step is None:
            return result, None
        steps.append(step)
    outputs = [_output(each, returned) for each in results]
    if not steps or any(output is None for output in outputs):
        return result, None
    made = [partial(torch.empty_strided, tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device) for t in returned]
    offsets = [0, *accumulate(-(-_bytes(tensor) // _APART) * _APART for tensor in others)]
    scratch = partial(torch.empty, offsets.pop(), dtype=torch.uint8, device=tensors[0].device) if others else None
    single = isinstance(result, Tensor)
    return result, Recording(made, scratch, offsets, steps, [o for o in outputs if o is not None], single)


def _step(variant: Any, grid: tuple[int, ...], arguments: Sequence[Any], everything: list[Tensor]) -> Any:
    """A launch as `Direct.again` has it, or None where it reads memory of somebody else."""
    values: list[Any] = []
    for argument in arguments:
        base = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
        if base is None:
            values.append(argument)
            continue
        if not base.data_ptr():
            if base is not argument:
                return None
            values.append(0)
            continue
        place = _place(base.data_ptr(), everything)
        if place is None:
            return None
        values.append(Place(*place, None if base is argument else (list(argument.shape), list(argument.strides))))
    return variant.again(grid, values)


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


def _output(result: Tensor, returned: list[Tensor]) -> tuple[int, tuple | None] | None:
    """Which of the tensors made a result is, and how it is viewed unless as it was made."""
    for i, tensor in enumerate(returned):
        if tensor.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() and tensor.dtype == result.dtype:
            if result.shape == tensor.shape and result.stride() == tensor.stride():
                return i, None
            return i, (tuple(result.shape), result.stride(), result.storage_offset())
    return None


def _prove(
    name: str, key: tuple, recording: Recording, tensors: list[Tensor], at: list[int], compute: Callable[..., Any],
    args: Sequence[Any],
) -> Any:  # fmt: skip
    """The op's result. The recording is proven if its own has the same bits, and given up if not."""
    result = compute(*args)
    if not _may_wait(tensors[0]):
        return result  # another time
    try:
        again = recording.repeat(tensors, at)
        pairs = [(result, again)] if recording.single else list(zip(result, again, strict=True))
        recording.proven = all(_same_bits(a, b) for a, b in pairs)
    except torch.OutOfMemoryError:  # another time, but not for ever
        recording.failures += 1
        if recording.failures < _ATTEMPTS:
            return result
    if recording.proven:
        _repeating.add(name)
    else:
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
