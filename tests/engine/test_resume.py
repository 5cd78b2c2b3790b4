"""Killed, interrupted, out of disk: the same call goes on and ends with the same bytes."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.engine import estimate, journal, process, request
from dirotq.dirotq_core.engine.journal import Journal, ResumeError, work_folder

from .. import processes
from .conftest import CAPTIONS, tree

CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import importlib.util
import dirotq.dirotq_core.engine, diffusers, transformers
from diffusers import FluxPipeline
spec = importlib.util.spec_from_file_location("shared", {str(Path(__file__).with_name("conftest.py"))!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
ready.set()
shared.Short("flux-tiny").run(sys.argv[1])
"""


def child(out):
    ready = processes.CONTEXT.Event()
    process = processes.start(CHILD, out, ready=ready)
    assert ready.wait(100)
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.thorough
def test_killed_at_random_moments(reference, tmp_path):
    out, random_delay = tmp_path / "out", random.Random(0)
    kills = 0
    for _ in range(3):
        running = child(out)
        time.sleep(random_delay.uniform(0.2, 2.5))
        running.kill()
        kills += running.wait().returncode == -signal.SIGKILL
        if out.exists():
            break
        assert [p.name for p in tmp_path.iterdir()] in ([], [".out.partial"])
    running = child(out) if not out.exists() or work_folder(out).exists() else None
    assert running is None or running.wait().returncode == 0
    assert kills and tree(out) == reference
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Cut(BaseException):
    """The power fails."""


def test_cut_at_every_write(flux, reference, tmp_path, monkeypatch):
    """Each run gets one write further than the one before, and loses what it was writing."""
    real, left = journal.sync, [0]

    def sync(file):
        if left[0] == 0:
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])
            raise Cut
        left[0] -= 1
        real(file)

    monkeypatch.setattr(journal, "sync", sync)
    monkeypatch.setattr("dirotq.dirotq_core.engine.output.sync", sync)
    out, cuts = tmp_path / "out", 0
    while True:
        left[0] = 1 + cuts % 4
        try:
            flux.run(out)
            break
        except Cut:
            cuts += 1
            if cuts > 8:  # the result's own files are synced in one go
                left[0] = 10**6
                monkeypatch.setattr(journal, "sync", real)
                monkeypatch.setattr("dirotq.dirotq_core.engine.output.sync", real)
    assert cuts > 5 and tree(out) == reference


def test_a_damaged_part_is_made_again(flux, reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_at(monkeypatch, "single_transformer_blocks.1", Cut)
    with pytest.raises(Cut):
        flux.run(out)
    monkeypatch.undo()
    part = work_folder(out) / "transformer_blocks.0.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    flux.run(out)
    assert tree(out) == reference


def stop_at(monkeypatch, name, error):
    original = process.Workshop.quantize

    def quantize(self, block, *args):
        if block.name == name:
            raise error
        return original(self, block, *args)

    monkeypatch.setattr(process.Workshop, "quantize", quantize)


def test_interrupt_on_the_command_line(flux, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[:2]))
    command = ["quantize", str(flux.model.folder), "--out", str(tmp_path / "out"), "--prompts", str(prompts), "--steps",
               "2", "--height", "128", "--width", "128", "--basis", "pca", "--rounding", "nearest",
               "--device", "cpu"]  # fmt: skip
    stop_at(monkeypatch, "single_transformer_blocks.0", KeyboardInterrupt)
    assert main(command) == 130
    assert "out.partial, run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert "bits per weight on average" in capsys.readouterr().out
    assert main(command) == 1 and "exists already" in capsys.readouterr().err


def test_a_full_disk(flux, reference, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", journal.write_safetensors, []

    def write(path, *args):
        calls.append(path)
        if len(calls) == 5:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    monkeypatch.setattr(journal, "write_safetensors", write)
    with pytest.raises(OSError, match=r"No space left.*what is finished is kept there: make room and run the same"):
        flux.run(out)
    assert not out.exists() and not list(work_folder(out).glob("*.tmp"))
    assert len(list(work_folder(out).glob("*.safetensors"))) == 4
    flux.run(out)
    assert tree(out) == reference


def test_too_little_room_is_said_before_anything_is_written(flux, tmp_path, monkeypatch):
    usage = estimate.shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the run needs"):
        flux.run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_may_only_be_so_large(flux, tmp_path):
    """The system's own refusal while parts are written: an error and not a crash."""
    pytest.importorskip("resource")
    script = CHILD.replace(
        "ready.set()", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 10**5,) * 2)"
    )
    limited = processes.run(script, tmp_path / "out")
    assert limited.returncode == 1 and "make room and run the same command again" in limited.stderr


def test_something_else_took_the_name(flux, undisturbed, reference, tmp_path, monkeypatch):
    """Finished parts are not thrown away for a folder that another run made."""
    out = tmp_path / "out"
    stop_at(monkeypatch, "single_transformer_blocks.1", Cut)
    with pytest.raises(Cut):
        flux.run(out)
    monkeypatch.undo()
    shutil.copytree(undisturbed, out)
    with pytest.raises(FileExistsError, match="is not from this run"):
        flux.run(out)
    shutil.rmtree(out)
    assert (work_folder(out) / "transformer_blocks.0.json").exists()
    flux.run(out)
    assert tree(out) == reference


def test_killed_while_cleaning_up(flux, reference, tmp_path, monkeypatch):
    real, left = Path.unlink, [0]

    def unlink(path, *args, **kwargs):
        left[0] += path.suffix == ".safetensors"
        if left[0] > 2:
            raise Cut
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Cut):
        flux.run(tmp_path / "out")
    monkeypatch.undo()
    assert work_folder(tmp_path / "out").exists()
    assert flux.run(tmp_path / "out").linears
    assert tree(tmp_path / "out") == reference and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_run_is_refused_by_name(flux, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(flux.model.folder, source)
    out = tmp_path / "out"
    stop_at(monkeypatch, "transformer_blocks.0", Cut)
    with pytest.raises(Cut):
        flux.run(out, source=source)
    cases = [
        ({"config": {"rank": 8}}, r"config\.basis was \"pca\" and is \"joint\""),
        ({"prompts": CAPTIONS[:3]}, 'prompts was "4 prompts'),
        ({"timesteps": 1}, "options.timesteps was 2 and is 1"),
        ({"call": {"num_inference_steps": 3}}, "call.num_inference_steps was 2 and is 3"),
        ({"sequential": False}, "options.sequential was true and is false"),
    ]
    for changes, message in cases:
        with pytest.raises(ResumeError, match=message):
            flux.run(out, source=source, **changes)
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ResumeError, match=r"model\.transformer/diffusion_pytorch_model\.safetensors was .* and is"):
        flux.run(out, source=source)


def test_two_at_once_are_refused(flux, tmp_path):
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        journal.commit("x", {"t": torch.ones(2)}, None)
        with pytest.raises(ResumeError, match="another process is working in"):
            Journal(tmp_path / "out", {"a": 1})
    (work_folder(tmp_path / "out") / "run.json").write_text("{")
    with pytest.raises(ResumeError, match="is damaged"):
        Journal(tmp_path / "out", {"a": 1})


def test_work_version_is_in_the_fingerprint(flux, tmp_path, monkeypatch):
    stop_at(monkeypatch, "transformer_blocks.0", Cut)
    with pytest.raises(Cut):
        flux.run(tmp_path / "out")
    monkeypatch.setattr(request, "WORK_VERSION", 0)
    with pytest.raises(ResumeError, match="work was 1 and is 0"):
        flux.run(tmp_path / "out")
