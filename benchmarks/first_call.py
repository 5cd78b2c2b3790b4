"""How long the first step of a quantized model takes, with nothing compiled yet and with what a run before compiled.

    python benchmarks/first_call.py [--models flux pixart] [--kinds eager compiled reduce-overhead] [--threads 1 8]

Each is a process of its own on the transformers of `step.py`. `cold`: the caches of Triton and of PyTorch's compiler
are empty folders. `warm`: the next process, with the same folders. first_s is the first call, import and loading left
out; ready_s the first four, after which CUDA graphs are recorded; then_s the fifth. threads: how many of ours compile
kernels at a time (by default as many as would without this script). Writes benchmarks/results/first_call.json.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KINDS = ("eager", "compiled", "reduce-overhead")
CALLS = 4


def child(name: str, kind: str, tiny: bool) -> None:
    """Print the seconds of the first calls, and what they ran on, as JSON."""
    import step_models
    import torch

    from dirotq.dirotq_core.config import DiRotQConfig
    from dirotq.kernels import rehearsal

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    model = step_models.dirotq(step_models.dense(name, tiny, device), DiRotQConfig(rank=64))
    arguments = step_models.inputs(name, tiny, 1024, 1, device)
    if kind != "eager":
        mode = {"mode": kind} if kind == "reduce-overhead" else {}
        model.compile_repeated_blocks(fullgraph=True, **mode)
    seconds = []
    if cuda:  # what made the model is no part of the first call; each call below waits for its own end
        torch.cuda.synchronize()
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        with torch.no_grad():
            model(**arguments)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    times = {"first_s": seconds[0], "ready_s": sum(seconds[:CALLS]), "then_s": seconds[CALLS]}
    print(json.dumps({"setting": step_models.setting(), "threads": rehearsal.threads(), "times": times}))


def measure(name: str, kind: str, threads: int | None, tiny: bool, caches: Path) -> dict:
    """What `child` prints, in a process with its caches in this folder. Raises CalledProcessError if that fails."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        **({} if threads is None else {"DIROTQ_COMPILE_THREADS": str(threads)}),
    }
    command = [sys.executable, __file__, "--child", name, kind, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["flux", "pixart"], choices=["flux", "pixart"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=int, default=[None])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script without a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, kind = arguments.child
        child(name, kind, arguments.tiny)
        return
    rows: list[dict] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "first_call.json"
    for name, kind, threads in itertools.product(arguments.models, arguments.kinds, arguments.threads):
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                found = measure(name, kind, threads, arguments.tiny, Path(folder))
                what = {"model": name, "kind": kind, "threads": found["threads"], "caches": caches}
                rows.append({**what, **found["times"]})
                file.write_text(json.dumps({**found["setting"], "rows": rows}, indent=1) + "\n")
                times = "  ".join(f"{key} {value:.2f}" for key, value in found["times"].items())
                print(f"{name:<8}{kind:<18}{found['threads']:<4}{caches:<6}{times}", flush=True)


if __name__ == "__main__":
    main()
