"""Kernels compiled in threads ahead of their launch: each variant once, none launched, nothing lost if one fails."""

import threading
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dirotq.kernels import rehearsal as module
from dirotq.kernels import replay
from dirotq.kernels.launch import OPTIONS, launch
from dirotq.kernels.rehearsal import current, rehearsal, threads
from dirotq.kernels.tables import lasting

BASE = torch.zeros(64, dtype=torch.bfloat16)


class Kernel:
    """Stands in for a Triton kernel of signature (a, n, word, WIDTH)."""

    arg_names = ("a", "n", "word", "WIDTH")
    params = tuple(SimpleNamespace(do_not_specialize=name == "word") for name in arg_names)
    cache_key = "sources"

    def __init__(self, compile=lambda: None):
        self.device_caches = defaultdict(dict)
        self.compile, self.compiled, self.launched, self.loaded = compile, [], [], 0

    def warmup(self, *args, grid, **constants):
        assert constants.items() >= OPTIONS.items()
        self.compile()
        self.compiled.append((args, grid, threading.current_thread().name))
        return self

    @property
    def run(self):
        self.loaded += 1

    def __getitem__(self, grid):
        def first(*args, **constants):
            self.compile()
            self.launched.append(args)
            return self

        return first


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv(module.ENVIRONMENT, "2")
    monkeypatch.setattr(module, "_PARSES_IN_THREADS", True)  # nothing is parsed here


def test_two_compile_at_a_time_and_nothing_is_launched():
    together = threading.Barrier(2, timeout=20)
    kernels = [Kernel(together.wait) for _ in range(2)]
    with rehearsal():
        for kernel in kernels:
            launch(kernel, (3,), BASE, 16, 5, WIDTH=64)
    for kernel in kernels:
        (((tensor, *args), grid, thread),) = kernel.compiled
        assert tensor.dtype == BASE.dtype and tensor.data_ptr() != BASE.data_ptr()  # which need not stay
        assert args == [16, 5] and grid == (3, 1, 1) and thread.startswith("dirotq-compile")
        assert kernel.loaded == 1 and not kernel.launched
        assert list(kernel.device_caches) == [-1]  # made here, not by two threads at a time


@pytest.mark.parametrize(
    ("other", "count"),
    [
        ((BASE, 32, 5, 64), 1),
        ((BASE, 16, 6, 64), 1),  # the word decides nothing
        ((torch.ones(16, dtype=torch.bfloat16), 48, 1, 64), 1),
        ((BASE, 17, 5, 64), 2),
        ((BASE, 1, 5, 64), 2),
        ((BASE, 16, 1 << 31, 64), 2),  # 64 bit
        ((BASE[1:], 16, 5, 64), 2),
        ((BASE.float(), 16, 5, 64), 2),
        ((BASE, 16, 5, 128), 2),
    ],
)
def test_each_variant_is_compiled_once(other, count):
    kernel = Kernel()
    with rehearsal():
        launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
        *args, width = other
        launch(kernel, (1,), *args, WIDTH=width)
    assert len(kernel.compiled) == count


def test_what_fails_fails_where_it_is_launched():
    def compile():
        raise RuntimeError("out of registers")

    kernel, other = Kernel(compile), Kernel()
    with rehearsal():
        launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
        launch(other, (1,), BASE, 16, 5, WIDTH=64)
    assert len(other.compiled) == 1
    with pytest.raises(RuntimeError, match="out of registers"):
        launch(kernel, (1,), BASE, 16, 5, WIDTH=64)


def test_what_was_launched_before_is_launched():
    kernel = Kernel()
    launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
    with rehearsal():
        launch(kernel, (2,), BASE, 16, 5, WIDTH=64)
    assert not kernel.compiled and len(kernel.launched) == 2


def test_it_ends_with_an_error_and_is_one_threads_own():
    kernel = Kernel()
    with pytest.raises(KeyboardInterrupt), rehearsal():
        seen = []
        other = threading.Thread(target=lambda: seen.append(current()))
        other.start()
        other.join()
        assert seen == [None] and current() is not None
        raise KeyboardInterrupt
    assert current() is None
    launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
    assert len(kernel.launched) == 1


def test_an_error_waits_for_what_has_begun():
    """Else kernels would be loaded, and memory be taken, while the call goes on without."""
    begun, go = threading.Event(), threading.Event()

    def compile():
        begun.set()
        go.wait(20)

    kernels = [Kernel(compile) for _ in range(9)]
    with pytest.raises(MemoryError), rehearsal():
        for kernel in kernels:
            launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
        assert begun.wait(20)
        threading.Timer(0.2, go.set).start()
        raise MemoryError
    compiled = [kernel.loaded for kernel in kernels]
    threading.Event().wait(0.2)
    assert 1 <= sum(compiled) < 9 and compiled == [kernel.loaded for kernel in kernels]


def test_filters_of_warnings_stay():
    """Which Triton before 3.9 changes while it compiles, and in threads does not restore."""
    before = list(warnings.filters)
    with rehearsal():
        launch(Kernel(lambda: warnings.simplefilter("ignore")), (1,), BASE, 16, 5, WIDTH=64)
    assert warnings.filters == before


def test_nothing_is_launched_while_it_is_loaded():
    """By another thread, which has the same kernel from Triton."""
    order = []

    class Slow(Kernel):
        @property
        def run(self):
            order.append("loading")
            started.set()
            threading.Event().wait(0.2)
            order.append("loaded")

        def __getitem__(self, grid):
            order.append("launch")
            return super().__getitem__(grid)

    started, kernel = threading.Event(), Slow()

    def launches():
        assert started.wait(20)
        launch(kernel, (1,), BASE, 16, 5, WIDTH=64)

    other = threading.Thread(target=launches)
    other.start()
    with rehearsal():
        launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
    other.join()
    assert order == ["loading", "loaded", "launch"]


def test_an_interrupt_does_not_wait():
    go = threading.Event()
    kernels = [Kernel(lambda: go.wait(20)) for _ in range(4)]
    try:
        with pytest.raises(KeyboardInterrupt), rehearsal():
            for kernel in kernels:
                launch(kernel, (1,), BASE, 16, 5, WIDTH=64)
            raise KeyboardInterrupt
        assert not any(kernel.compiled for kernel in kernels)
    finally:
        go.set()


@pytest.mark.parametrize(("long", "said"), [(60.0, 0), (0.0, 1)])
def test_a_long_compilation_is_named_while_it_lasts(long, said, monkeypatch, caplog):
    module.say_compiling.cache_clear()
    monkeypatch.setattr(module, "_LONG", long)
    messages = []

    def compile():
        for _ in range(100 if said else 1):
            messages[:] = [r.message for r in caplog.records if "compiling kernels" in r.message]
            if messages:
                return
            threading.Event().wait(0.05)

    for _ in range(2):
        with rehearsal():
            launch(Kernel(compile), (1,), BASE, 16, 5, WIDTH=64)
    assert len(messages) == said and all("cache" in message for message in messages)


def test_nothing_made_in_one_is_kept():
    assert lasting(BASE)
    with rehearsal():
        assert not lasting(BASE)


def test_no_call_is_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_launches", lambda tensor: True)
    monkeypatch.setattr(replay, "_launching", lambda: (lambda: False,))
    monkeypatch.setattr(replay, "_record", lambda *_: pytest.fail("recorded"))
    monkeypatch.setattr(replay, "implementation", lambda *_: lambda x: x)
    replay.enable(True)
    with rehearsal():
        assert replay.call(lambda x: None, "rotate", 1, (BASE,)) is BASE


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5", ""])
def test_number_of_threads_is_checked(given, monkeypatch):
    monkeypatch.setenv(module.ENVIRONMENT, given)
    with pytest.raises(ValueError, match=f"DIROTQ_COMPILE_THREADS is '{given}'; a number"):
        threads()


def test_number_of_threads(monkeypatch):
    assert threads() == 2
    monkeypatch.delenv(module.ENVIRONMENT)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert threads() == 3
    monkeypatch.delattr(module.os, "sched_getaffinity")
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    assert threads() == 8
    monkeypatch.setattr(module, "_PARSES_IN_THREADS", False)
    assert threads() == 1
    monkeypatch.setenv(module.ENVIRONMENT, "4")
    assert threads() == 1
