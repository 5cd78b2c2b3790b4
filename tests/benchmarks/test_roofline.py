"""`benchmarks/roofline.py` scales each kind of work by the peak that bounds it."""

import json
import sys

import pytest

from .conftest import BENCHMARKS


@pytest.fixture
def roofline(script):
    return script("roofline")


def test_each_kind_has_its_peak(roofline):
    """An RTX 4090 has 660.6 of the H200's 1979 int8 operations, 165.2 of 989.5 in bf16, 1.008 of 4.8 of bandwidth."""
    work = {"matmul": 10.0, "attention": 5.0, "rotate + quantize": 1.0, "elementwise": 2.0}
    ours = roofline.expected("ours-r64-compiled", work, "NVIDIA H200", "RTX 4090")
    assert ours == pytest.approx(10 * 1979 / 660.6 + 5 * 989.5 / 165.2 + 3 * 4.8 / 1.008)
    bf16 = roofline.expected("bf16-compiled", work, "NVIDIA H200", "RTX 4090")
    assert bf16 == pytest.approx(15 * 989.5 / 165.2 + 3 * 4.8 / 1.008)
    assert roofline.expected("bf16", work, "NVIDIA H200", "NVIDIA H200") == pytest.approx(18)


def test_the_committed_steps(roofline, monkeypatch, capsys):
    """Attention elsewhere is PyTorch's, in both."""
    monkeypatch.setattr(sys, "argv", ["roofline.py"])
    roofline.main()
    shown = capsys.readouterr().out
    steps = json.loads((BENCHMARKS / "results" / "step.json").read_text())["steps"]
    step = next(s for s in steps if (s["model"], s["pixels"], s["batch"]) == ("flux", 1024, 1) and s["checks"])
    rows = {name: dict(step["variants"][name]["buckets_ms"]) for name in ("bf16-compiled", "ours-r64-compiled")}
    rows["ours-r64-compiled"]["attention"] = rows["bf16-compiled"]["attention"]
    cells = [f"{roofline.expected(name, row, 'NVIDIA H200', 'RTX 5090'):.0f}" for name, row in rows.items()]
    table = shown.split("flux 1024² batch 1: expected ms, not measured")[1].split("\n\n")[1]
    assert f" | {' | '.join(cells)} |" in next(line for line in table.splitlines() if "RTX 5090" in line)
