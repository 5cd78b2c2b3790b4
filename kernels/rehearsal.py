"""Compiling kernels in several threads, ahead of their first launch.

A kernel is compiled when it is first launched, one after the other, and a model needs some twenty. Compilers hold no
lock of Python's for most of that time. So in a `rehearsal` a launch of what this process has not launched yet launches
nothing and leaves the compiling to a pool of threads. What ops return in it holds anything, and must not be kept.
"""

import copy
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "DIROTQ_COMPILE_THREADS"
_LONG = 3.0  # seconds; to load what is in the cache takes one
_MOST_THREADS = 8  # each holds some 300 MB while it compiles, and a model has as many large kernels

#: Of what makes a compiled kernel ready: another thread could launch one that is so by half.
loading = threading.RLock()

# Before 3.11.8 and 3.12.2, `ast.parse` fails now and then where two threads parse, as Triton does (cpython#106905).
_PARSES_IN_THREADS = sys.version_info >= (3, 12, 2) or (3, 11, 8) <= sys.version_info < (3, 12)

_log = logging.getLogger(__name__)
_here = threading.local()


def threads() -> int:
    """How many compile at a time: DIROTQ_COMPILE_THREADS, or one for each processor, up to 8. 1 is no rehearsal.

    Always 1 with a Python that cannot parse in several. Raises ValueError if the variable holds anything but a whole
    number from 1 on.
    """
    given = os.environ.get(ENVIRONMENT)
    if given is not None and (not given.isdecimal() or int(given) < 1):
        raise ValueError(f"{ENVIRONMENT} is {given!r}; a number of threads from 1 on is needed")
    if not _PARSES_IN_THREADS:
        return 1
    if given is None:
        mine = getattr(os, "sched_getaffinity", None)  # those that a container or a batch system leaves us
        return min(_MOST_THREADS, len(mine(0)) if mine else os.cpu_count() or 1)
    return int(given)


@cache
def say_compiling() -> None:
    """Once: else nobody knows what the first step waits for."""
    import triton

    _log.warning(
        "dirotq: Triton is compiling kernels for this GPU; the first step takes up to a minute or two, later ones and "
        "later processes use what it keeps in its cache (%s)",
        triton.knobs.cache.dir,
    )


class Rehearsal:
    """What one thread has launched for the sake of compiling."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.begun: dict[tuple, Future] = {}

    def compile(
        self, kernel: Any, device: int, grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, Any]
    ) -> None:
        """Begin to compile what `kernel[grid](*args, **constants)` would launch on GPU number `device`."""
        key = (id(kernel), device, *_looks(kernel, args), *constants, *constants.values())
        if key not in self.begun:
            # Made once for all variants of a kernel, and not by two threads at a time.
            _ = kernel.cache_key, kernel.device_caches[device]
            small = [_small(arg) for arg in args]
            self.begun[key] = self.pool.submit(_compile, kernel, device, grid, small, constants)


def current() -> Rehearsal | None:
    """That of this thread, if one is under way."""
    return getattr(_here, "rehearsal", None)


@contextmanager
def rehearsal() -> Iterator[None]:
    """The launches of this thread, rehearsed: when it ends, what they need is compiled and on the GPU.

    What cannot be compiled is left to the launch, whose error says why. Raises ValueError as `threads` does.
    """
    pool = ThreadPoolExecutor(threads(), "dirotq-compile")
    mine = _here.rehearsal = Rehearsal(pool)
    start = time.perf_counter()
    # Triton before 3.9 changes the process's filters while it compiles, in all threads, and restores them in any order.
    with warnings.catch_warnings():
        try:
            try:
                yield
            finally:
                _here.rehearsal = None
            if wait(mine.begun.values(), max(0.0, start + _LONG - time.perf_counter())).not_done:
                say_compiling()
                wait(mine.begun.values())
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        finally:  # an interrupt does not wait for what has begun
            pool.shutdown(wait=False, cancel_futures=True)


def _looks(kernel: Any, args: Sequence[Any]) -> list[Any]:
    """What Triton makes variants for, of the run-time arguments. What it tells apart besides, the launch compiles."""
    looks: list[Any] = []
    for parameter, arg in zip(kernel.params, args, strict=False):
        if isinstance(arg, Tensor):
            looks += (arg.dtype, arg.data_ptr() % 16 == 0)
        elif isinstance(arg, int):
            looks.append(arg.bit_length() > 31 if parameter.do_not_specialize else (arg == 1, arg % 16 == 0))
        else:
            base = getattr(arg, "base", None)
            looks.append(type(arg) if base is None else (base.dtype, *arg.block_shape))
    return looks


def _small(arg: Any) -> Any:
    """An argument that Triton compiles the same for, and whose memory may stay until it has."""
    if isinstance(arg, Tensor):
        aligned = torch.empty(32, dtype=arg.dtype, device=arg.device)
        return aligned if arg.data_ptr() % 16 == 0 else aligned[1:]
    if getattr(arg, "base", None) is None:
        return arg
    descriptor = copy.copy(arg)
    descriptor.base = _small(arg.base)
    return descriptor


def _compile(
    kernel: Any, device: int, grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    with torch.cuda.device(device) if device >= 0 else nullcontext():  # a thread begins on the first
        compiled = kernel.warmup(*args, grid=grid, **constants)
        with loading:
            _ = compiled.run  # makes what launches it, and loads it
