"""`dirotq demo` from end to end, with few prompts."""

import subprocess
import sys

import pytest
from PIL import Image

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.demo.run import claim_folder

from .. import processes


@pytest.fixture
def started(monkeypatch):
    """Commands of the processes that the demo starts: the first one as it is, the others forked."""
    started, run = [], subprocess.run

    def begin(command, check):
        started.append(command)
        if len(started) == 1:
            return run(command, check=check)
        assert command[:2] == [sys.executable, "-m"]
        code = f"import runpy; runpy.run_module({command[2]!r}, run_name='__main__', alter_sys=True)"
        done = processes.run(code, *command[3:])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(subprocess, "run", begin)
    return started


def test_demo(tmp_path, capsys, started):
    assert main(["demo", "--out", str(tmp_path), "--prompts", "3", "--calibration", "4", "--device", "cpu"]) == 0
    assert len(started) == 4
    table = (tmp_path / "table.txt").read_text()
    assert "pixart-sigma-tiny" in table and "flux-tiny" in table and table.strip() in capsys.readouterr().out
    sheet = Image.open(tmp_path / "contact-sheet.png")
    assert sheet.width > 3 * 128 and len(sheet.convert("RGB").getcolors(1 << 24)) > 100
    for line in table.splitlines()[2:]:
        psnr, ssim = float(line.split()[1]), float(line.split()[2])
        assert psnr > 20 and ssim > 0.8


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    theirs = tmp_path / "pixart-sigma-tiny" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "was not made by the demo" in capsys.readouterr().err
    assert theirs.read_text() == "precious" and not (tmp_path / ".dirotq-demo").exists()


def test_a_folder_of_the_demo_is_used_again(tmp_path):
    claim_folder(tmp_path / "new")
    claim_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file exists"):
        claim_folder(tmp_path / "file")
