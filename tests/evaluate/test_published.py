"""The published rows by one command: `dirotq` understands what it runs, and it goes on where it was."""

import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from dirotq.dirotq_core.cli import _parser

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published.py"
FILES = ["--prompts", "a.json", "--real", "b c"]


@pytest.fixture
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.mark.parametrize("model", ["pixart", "flux"])
def test_its_commands_are_understood(main, model, tmp_path, capsys):
    main([model, *FILES, "--out", str(tmp_path / "o"), "--dry-run", "--", "--offload"])
    lines = capsys.readouterr().out.splitlines()
    paper, dirotq, report = [_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert (paper.method, dirotq.method, dirotq.high_fraction) == ("paper", "dirotq", 0.125)
    assert paper.samples == dirotq.samples == 128 and paper.model == dirotq.model
    assert paper.weight_only == dirotq.weight_only == (["ff.net.2"] if model == "pixart" else None)
    assert report.reference == f"16 bit={paper.model}" and report.offload and report.real == Path("b c")
    assert report.models == [f"paper={paper.out}", f"dirotq={dirotq.out}"]
    assert (report.samples, report.metrics, report.real_by_id) == (5000, ["all"], True)
    assert (report.steps, report.guidance, report.dtype) == (
        (20, 4.5, "float16") if model == "pixart" else (50, 3.5, "bfloat16"))  # fmt: skip


def test_it_goes_on_and_passes_failures_on(main, tmp_path, monkeypatch):
    """What is quantized already is not again; a command that fails ends it with its status."""
    ran, fail = [], {"evaluate"}

    def fake(command, check):
        verb, out = command[3], Path(command[command.index("--out") + 1])
        ran.append((verb, out.name))
        if verb not in fail:
            out.mkdir(parents=True)
        return subprocess.CompletedProcess(command, 3 if verb in fail else 0)

    monkeypatch.setattr(subprocess, "run", fake)
    command = ["pixart", *FILES, "--out", str(tmp_path), "--source", "mine"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 3
    assert ran == [("quantize", "paper"), ("quantize", "dirotq"), ("evaluate", "report")]
    ran.clear()
    fail.clear()
    main(command)
    assert ran == [("evaluate", "report")]
