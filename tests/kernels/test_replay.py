"""Recordings of what an op launched, repeated by small kernels that compute on the CPU, at addresses."""

import ctypes
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs launches", allow_module_level=True)

from dirotq.kernels import launch as launching
from dirotq.kernels import replay
from dirotq.kernels.launch import launch
from dirotq.kernels.launched import taking_notes
from dirotq.kernels.triton_launcher import Direct


def floats(address, count):
    return (ctypes.c_float * count).from_address(address)


class Kernel:
    """out = x factor + y, `count` floats each: at addresses, when it is launched directly."""

    arg_names = ("x", "y", "out", "count", "factor")

    def __getitem__(self, grid):
        def first(x, y, out, count, factor, **constants):
            torch.add(y.reshape(-1), x.reshape(-1), alpha=factor, out=out)
            return SimpleNamespace()

        return first

    @staticmethod
    def direct(compiled, rest):
        def run(*line):
            *grid, stream, x, y, out, count, factor = line
            assert grid == [1, 1, 1] and stream == 7
            floats(out, count)[:] = [a * factor + b for a, b in zip(floats(x, count), floats(y, count), strict=True)]

        return Direct(run, [], [], rest, nested=False)


KERNEL = Kernel()


@pytest.fixture
def op(on_gpu, monkeypatch):
    """`op(*args)` runs `op.body` as an op does; `op.runs` counts how often."""
    monkeypatch.setattr(launching, "direct", Kernel.direct)
    made = SimpleNamespace(runs=0, body=twice, check=lambda *args: None)

    def compute(*args):
        made.runs += 1
        return made.body(*args)

    monkeypatch.setattr(replay, "implementation", lambda name, device, block: compute)

    class Op:
        def __call__(self, *args):
            return replay.call(lambda *a: made.check(*a), "op", 1, args)

        def __getattr__(self, name):
            return getattr(made, name)

        def __setattr__(self, name, value):
            setattr(made, name, value)

    return Op()


def add(x, y, out, factor=2.0):
    launch(KERNEL, (1,), x, y, out, x.numel(), factor, num_warps=1)


def twice(x, y, factor=2.0):
    """(x factor + y) factor + y, by way of memory of its own."""
    between, out = torch.empty_like(x), torch.empty(x.shape)
    add(x, y, between, factor)
    add(between, y, out, factor)
    return out


def numbers(*shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_repeats_from_the_fourth_call_on(op):
    for i in range(8):
        x, y = numbers(5, seed=i), numbers(5, seed=-i - 1)
        torch.testing.assert_close(op(x, y), 4 * x + 3 * y, rtol=0, atol=0)
        assert op.runs == min(i + 1, 3)  # compiles, is recorded, and is compared with its repetition


@pytest.mark.parametrize(
    ("other", "runs"),
    [
        (lambda x, y: (x[:4], y[:4], 2.0), 3),
        (lambda x, y: (x[None], y, 2.0), 2),  # for which nothing is compiled
        (lambda x, y: (x[::2], y[:8], 2.0), 3),
        (lambda x, y: (torch.cat([x[:1], x])[1:], y, 2.0), 3),  # at another alignment
        (lambda x, y: (x, y, 3.0), 3),
        (lambda x, y: (y, x, 2.0), 0),
    ],
)
def test_every_kind_has_a_recording_of_its_own(op, other, runs):
    op.body = lambda x, y, factor: twice(x.contiguous(), y, factor) if x.is_contiguous() else x * factor**2 + y * 3
    x, y = numbers(16, seed=1), numbers(16, seed=2)
    for _ in range(4):
        op(x, y, 2.0)
    x, y, factor = other(x, y)
    before, slow = op.runs, not x.is_contiguous()  # which that op computes otherwise
    for _ in range(6):
        assert torch.equal(op(x, y, factor), x * factor**2 + y * (factor + 1))
    assert op.runs - before == (6 if slow else runs)


def test_pointers_into_arguments_and_results_that_are_views(op):
    def body(both):
        out = torch.empty(2, 8)
        x, y = both[1], both[2]
        launch(KERNEL, (1,), x, y, out[0], 8, 2.0, num_warps=1)
        launch(KERNEL, (1,), y, x, out[1], 8, 3.0, num_warps=1)
        return out[1], out.T

    op.body = body
    for i in range(6):
        both = numbers(3, 8, seed=i)
        first, whole = op(both)
        expected = torch.stack([2 * both[1] + both[2], 3 * both[2] + both[1]])
        assert torch.equal(first, expected[1]) and torch.equal(whole, expected.T) and whole.stride() == (1, 8)
        assert op.runs == min(i + 1, 3)


def test_other_work_is_never_left_out(op):
    def body(x, y):
        out = torch.empty_like(x)
        add(x + 1, y, out)
        return out

    op.body = body
    for i in range(8):
        x, y = numbers(5, seed=i), numbers(5, seed=-i - 1)
        assert torch.equal(op(x, y), 2 * (x + 1) + y)
    assert op.runs == 8

    foreign = numbers(5, seed=0)
    op.body = lambda x, y: twice(x, foreign)
    replay.enable(True)
    for i in range(8):
        foreign.copy_(numbers(5, seed=i))
        assert torch.equal(op(x, y), 4 * x + 3 * foreign)
    assert op.runs == 16


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_looking_and_what_is_more(on_gpu, inference):
    x = numbers(4, 6, seed=1)
    with torch.inference_mode(inference):
        for look in (
            lambda: x.view(24)[3:9].reshape(2, 3).T.split(1),
            lambda: (x[0].contiguous(), x.flatten(), x.unbind(1), x[None].expand(2, 4, 6), x.to(torch.float32)),
            lambda: (torch.empty_like(x), x.new_empty(3), torch.empty(2, 3).as_strided((3,), (2,))),
        ):
            with replay._Watch() as watch:
                look()
            assert not watch.more
        for more in (
            lambda: x + 1, lambda: x.T.contiguous(), lambda: x.T.reshape(24), lambda: x.clone(), lambda: x.double(),
            lambda: torch.empty(3).zero_(), lambda: torch.zeros(3), lambda: torch.equal(x, x), lambda: x.sum().item(),
            lambda: torch.cat([x, x]), lambda: torch._foreach_add_([x.clone()], 1),
        ):  # fmt: skip
            with replay._Watch() as watch:
                more()
            assert watch.more


def test_one_recording_at_a_time(op):
    """Another thread's call meanwhile is the op's own."""
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    for _ in range(2):
        op(x, y, 3.0)  # compiled for this factor

    def body(x, y, factor):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: outcomes.append(op(y, x, 3.0)))
            other.start()
            other.join()
        return twice(x, y, factor)

    outcomes = []
    op.body = body
    replay.enable(True)
    assert torch.equal(op(x, y, 3.0), 9 * x + 4 * y) and torch.equal(outcomes[0], 9 * y + 4 * x)
    assert len(replay._known) == 1


def test_a_profiler_of_tritons_hears_of_every_launch(op, monkeypatch):
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    launching_ = replay._launching()
    monkeypatch.setattr(replay, "_launching", lambda: (lambda: True, *launching_[1:]))
    for _ in range(6):
        op(x, y)
    assert op.runs == 6 and not replay._known


def test_without_triton(op, monkeypatch):
    """The reference runs; nothing that imports Triton does."""

    def reference(x, y):
        return 4 * x + 3 * y

    reference.__module__ = "dirotq.kernels.reference"
    monkeypatch.setattr(replay, "implementation", lambda name, device, block: reference)
    monkeypatch.setattr(replay, "_launching", lambda: pytest.fail("imports Triton"))
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    for _ in range(6):
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    assert not replay._known


def test_two_arguments_at_one_address(op):
    """Which of the two a launch reads cannot be told; a recording of two that lie apart serves them."""
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    for _ in range(3):
        assert torch.equal(op(x, x), 7 * x)
    for _ in range(2):
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    assert torch.equal(op(y, y), 7 * y) and torch.equal(op(y, x), 4 * y + 3 * x)


def test_a_wrong_repetition_is_given_up(op, monkeypatch):
    monkeypatch.setattr(replay.Recording, "repeat", lambda self, tensors, at: torch.zeros_like(tensors[0]))
    for i in range(8):
        x, y = numbers(5, seed=i), numbers(5, seed=-i - 1)
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    assert op.runs == 8


def test_without_memory_for_a_second_result(op, monkeypatch):
    whole = replay.Recording.repeat

    def repeat(self, tensors, at):
        raise torch.OutOfMemoryError("no more")

    x, y = numbers(5, seed=1), numbers(5, seed=2)
    monkeypatch.setattr(replay.Recording, "repeat", repeat)
    for _ in range(5):  # two of which are compared, or would be
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    monkeypatch.setattr(replay.Recording, "repeat", whole)
    assert op.runs == 5
    for _ in range(5):
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    assert op.runs == 6

    monkeypatch.setattr(replay, "_same_bits", lambda a, b: repeat(None, None, None))
    replay.enable(True)
    for _ in range(9):
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    (given_up,) = replay._known.values()
    assert op.runs == 15 and not isinstance(given_up, replay.Recording)


def test_not_a_number_equals_itself(op):
    x, y = torch.full((5,), torch.nan), numbers(5, seed=2)
    for _ in range(5):
        assert op(x, y).isnan().all()
    assert op.runs == 3


def test_bad_arguments_and_errors(op):
    def check(x, y):
        if y.numel() != 5:
            raise ValueError("five are needed")

    op.check = check
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    for _ in range(5):
        op(x, y)
        with pytest.raises(ValueError, match="five"):
            op(x, y[:4])
    with pytest.raises(ValueError, match="five"):
        op(x[:4], y[:4])

    def body(x, y):
        raise RuntimeError("inside")

    op.body = body
    with pytest.raises(RuntimeError, match="inside"):
        op(x[None], y)
    with taking_notes() as notes:  # those of a failed recording are no longer taken
        op.body = twice
        assert torch.equal(op(x[:, None], y), (4 * x + 3 * y)[:, None])
    assert not notes or all(note is not None for note in notes)


def test_turned_off(op):
    replay.enable(False)
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    for _ in range(6):
        assert torch.equal(op(x, y), 4 * x + 3 * y)
    assert op.runs == 6
    code = "from dirotq.kernels import replay; print(replay._enabled)"
    for value, said in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "DIROTQ_REPLAY": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_notes_are_of_one_thread(on_gpu, monkeypatch):
    monkeypatch.setattr(launching, "direct", Kernel.direct)
    x, y = numbers(5, seed=1), numbers(5, seed=2)
    with taking_notes() as notes:
        other = threading.Thread(target=lambda: [add(x, y, torch.empty(5)) for _ in range(3)])
        other.start()
        other.join()
        assert not notes
        add(x, y, torch.empty(5))
        assert len(notes) == 1
