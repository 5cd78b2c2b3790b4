"""`launch` calls a compiled variant directly where the arguments ask for one that it has seen, and only there."""

from types import SimpleNamespace

import pytest
import torch

from dirotq.kernels.launch import OPTIONS, cdiv, launch


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("direct", grid, arguments))


class Kernel:
    """Stands in for a Triton kernel of signature (a, b, n, WIDTH, FLAG)."""

    arg_names = ("a", "b", "n", "WIDTH", "FLAG")

    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def first(*arguments, **constants):
            assert constants.items() >= OPTIONS.items()
            self.log.append(("compiled", grid, arguments))
            return Compiled(self.log)

        return first


BASE = torch.zeros(64, dtype=torch.bfloat16)


def test_second_launch_is_direct():
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (3,), BASE, BASE, 7, FLAG=True, WIDTH=64, num_warps=4)
    (how, grid, arguments), (then, same_grid, all_arguments) = kernel.log
    assert (how, then) == ("compiled", "direct") and grid == same_grid == (3, 1, 1)
    assert all_arguments == (*arguments, 64, True)  # constants follow in the order of the signature


@pytest.mark.parametrize(
    "other",
    [
        ((BASE[1:], BASE, 7), {}),  # another alignment
        ((BASE.float(), BASE, 7), {}),
        ((BASE, BASE, 8), {}),
        ((BASE, BASE, 7), {"WIDTH": 128}),
        ((BASE, BASE, 7), {"num_warps": 8}),
    ],
)
def test_what_decides_the_variant(other):
    kernel = Kernel()
    constants = {"WIDTH": 64, "FLAG": True, "num_warps": 4}
    launch(kernel, (1,), BASE, BASE, 7, **constants)
    launch(kernel, (1,), *other[0], **{**constants, **other[1]})
    assert [how for how, *_ in kernel.log] == ["compiled", "compiled"]


def test_grid_and_data_do_not():
    kernel = Kernel()
    for grid, tensor in (((1,), BASE), ((2, 5), torch.ones(16, dtype=torch.bfloat16))):
        launch(kernel, grid, tensor, BASE, 7, WIDTH=64, FLAG=True)
    assert [(how, grid) for how, grid, _ in kernel.log] == [("compiled", (1, 1, 1)), ("direct", (2, 5, 1))]


@pytest.mark.parametrize(("seconds", "said"), [(0.2, 0), (3.0, 1)])
def test_a_long_compilation_is_named_once(seconds, said, monkeypatch, caplog):
    from dirotq.kernels import launch as module
    from dirotq.kernels import rehearsal

    rehearsal.say_compiling.cache_clear()
    clock = iter(i * seconds for i in range(100))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    kernel = Kernel()
    for width in (64, 64, 128):
        launch(kernel, (1,), BASE, BASE, 7, WIDTH=width, FLAG=True)
    messages = [record.message for record in caplog.records if "compiling kernels" in record.message]
    assert len(messages) == said and all("cache" in message for message in messages)


def test_cdiv():
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
