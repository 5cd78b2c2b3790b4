"""Kill the streaming engine at random moments, again and again, until it is through; then compare the bytes.

    python benchmarks/kill.py --rounds 20

Each round is a run of an embedded model in a process of its own, killed with SIGKILL after a random time and started
again. A run that is allowed to finish is compared with an undisturbed one, file by file. Writes
benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "kill.json"
CHILD = """
import sys, dirotq, transformers
from diffusers import FluxPipeline, PixArtSigmaPipeline
from dirotq.dirotq_core.demo.embedded import MODELS, prompts
from dirotq.dirotq_core.engine import EngineOptions, quantize_checkpoint
model = MODELS[sys.argv[1]]
captions = [s.caption() for s in prompts(4, seed=5, held_out=False)]
print("ready", flush=True)
quantize_checkpoint(
    model.folder, sys.argv[2], dirotq.DiRotQConfig(basis="pca"), captions, progress=False,
    call={**model.call, "num_inference_steps": 4}, options=EngineOptions(timesteps=2, draw_batch=2),
)
"""


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(name: str, out: Path) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, name, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="kills (default %(default)s)")
    parser.add_argument("--model", default="flux-tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    begin = time.perf_counter()
    assert start(args.model, folder / "whole").wait() == 0
    seconds = time.perf_counter() - begin
    expected = tree(folder / "whole")
    moments, finished, equal, out = [], 0, 0, folder / "out"
    while len(moments) < args.rounds:
        child, delay = start(args.model, out), chance.uniform(0, 0.8 * seconds)
        try:
            child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            parts = len(list((folder / ".out.partial").glob("*.json"))) if (folder / ".out.partial").exists() else 0
            moments.append({"seconds": round(delay, 2), "finished_parts": parts})
            print(moments[-1], flush=True)
        if out.exists() or len(moments) == args.rounds:
            if not out.exists() or (folder / ".out.partial").exists():
                assert start(args.model, out).wait() == 0
            finished += 1
            equal += tree(out) == expected and not (folder / ".out.partial").exists()
            shutil.rmtree(out)
    print(f"{len(moments)} kills, {equal} of {finished} results equal to the undisturbed one")
    body = {"model": args.model, "kills": moments, "results": finished, "equal": equal}
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
