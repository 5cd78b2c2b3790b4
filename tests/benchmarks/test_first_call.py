"""`benchmarks/first_call.py` times the first calls of a small model in a process with caches of its own."""

import pytest


@pytest.mark.thorough
def test_the_first_calls_of_a_process(script, tmp_path):
    found = script("first_call").measure("pixart", "eager", 1, True, tmp_path)
    assert found["setting"].keys() == {"gpu", "torch", "triton", "python"}
    assert found["threads"] == 1
    times = found["times"]
    assert 0 < times["then_s"] < times["ready_s"] and 0 < times["first_s"] < times["ready_s"]
