"""`benchmarks/step.py` goes on when what it prepares fails or is interrupted."""

import pytest
import torch
import torch._inductor.config

pytest.importorskip("matplotlib")


@pytest.fixture
def step(script):
    return script("step")


def test_a_failure_is_named(step, capsys):
    def fail():
        raise ValueError("16 values are needed\nof 13")

    assert step.attempt("peer", fail) is None
    assert "peer is left out: ValueError: 16 values are needed\n" in capsys.readouterr().out
    assert step.attempt("peer", lambda: 3) == 3


def test_an_interrupt_ends_the_rounds(step, capsys):
    class Timed:
        def __init__(self, name, interrupted_at):
            self.name, self.calls, self.at = name, 0, interrupted_at

        def milliseconds(self):
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            return self.calls

    assert step.rounds([Timed("a", 0), Timed("b", 0)], 2) == {"a": [1, 2], "b": [1, 2]}
    assert step.rounds([Timed("a", 0), Timed("b", 3)], 5) == {"a": [1, 2], "b": [1, 2]}
    assert "interrupted: 2 of 5 rounds" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):  # nothing has been timed
        step.rounds([Timed("a", 1)], 5)


@pytest.mark.thorough
@torch._inductor.config.patch(compile_threads=2)
def test_compiler_helpers_work_after_a_signal_that_ended_them(step, capsys):
    from torch._inductor.async_compile import AsyncCompile

    step.shutdown_compile_workers()
    helpers = AsyncCompile.process_pool()
    assert helpers.submit(int, "3").result(120) == 3

    def interrupted():  # as `timeout` does it: the signal goes to the whole group of processes
        helpers.process.terminate()
        helpers.process.wait(30)
        raise KeyboardInterrupt

    try:
        assert step.attempt("peer", interrupted) is None
        assert "peer is left out: KeyboardInterrupt" in capsys.readouterr().out
        assert AsyncCompile.process_pool().submit(int, "4").result(120) == 4
    finally:
        step.shutdown_compile_workers()
