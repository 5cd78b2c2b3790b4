"""Two processes on one machine make what one makes, up to the rounding of sums."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dirotq.dirotq_core.engine.dist import World
from dirotq.dirotq_core.engine.journal import Journal, work_folder
from dirotq.dirotq_core.report import QuantizationReport

from .. import processes
from .test_resume import CHILD

#: Without a parent that waits for it.
ALONE = CHILD.replace("ready.set()", "")


def launch(folder, out, processes):
    script = folder / "child.py"
    script.write_text(ALONE)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script), str(out)]
    subprocess.run([sys.executable, *command], check=True, timeout=200, cwd=Path(__file__).parents[3])


def test_two_processes(undisturbed, tmp_path):
    launch(tmp_path, tmp_path / "two", 2)
    assert not work_folder(tmp_path / "two").exists()
    alone, together = QuantizationReport.load(undisturbed), QuantizationReport.load(tmp_path / "two")
    assert [(r.name, r.tokens) for r in together.linears] == [(r.name, r.tokens) for r in alone.linears]
    assert abs(together.median_output_db - alone.median_output_db) < 1
    weights = "transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(undisturbed / weights), load_file(tmp_path / "two" / weights)
    first = [n for n in a if n.startswith("transformer_blocks.0.") and a[n].dtype == torch.uint8]
    assert a.keys() == b.keys() and first
    # Later blocks see inputs that differ where a code of an earlier one does.
    different = sum((a[n] != b[n]).sum() for n in first) / sum(a[n].numel() for n in first)
    assert different < 0.01


def test_all_processes_say_what_stopped_the_first(tmp_path):
    """Not that a connection was lost."""
    *before, last = ALONE.splitlines()
    script = "\n".join([*before, "try:", f"    {last}", "except ValueError as error:", "    print(f'said: {error}')"])
    work = work_folder(tmp_path / "out")
    with Journal(tmp_path / "out", {"a": 1}) as journal:
        journal.commit("x", {"t": torch.ones(2)}, None)
    for done in processes.together(script, tmp_path / "out"):
        assert done.returncode == 0, done.stderr
        assert f"said: {work} holds an unfinished run that was started differently" in done.stdout


def test_alone_nothing_is_split():
    world = World.join()
    assert world == World() and world.first and world.mine([1, 2, 3]) == [1, 2, 3]
    assert world.gather([3, 1, 2], world.split([1, 1, 5])) == [1, 2, 3]
    assert world.share("x") == "x" and world.device("cuda") == "cuda"
    world.wait()
    world.leave()


def test_shares_make_the_whole(monkeypatch):
    items = list(range(7))
    shares = [World(rank, 3).mine(items) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == items


def test_the_costliest_sites_are_apart(monkeypatch):
    costs, items = [1, 9, 2, 8, 7, 1, 0], list("abcdefg")
    shares = World(0, 3).split(costs)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert sorted(sum(costs[i] for i in share) for share in shares) == [9, 9, 10]

    def all_gather(box, mine):
        box[:] = [[items[i] for i in share] for share in shares]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    assert World(1, 3).gather([items[i] for i in shares[1]], shares) == items
