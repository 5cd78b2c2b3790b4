"""One denoising step of a transformer at its real shape, side by side with what people would use instead.

    python benchmarks/step.py [--models flux pixart] [--sizes 1024x1 1024x4 512x1] [--variants bf16 bf16-compiled …]

eager: as loaded. compiled: `compile_repeated_blocks(fullgraph=True)`. reduce-overhead: that with the mode of this name,
a CUDA graph for each block. graph: the compiled step captured as one CUDA graph, which leaves nothing to the host.
Variants are timed in turn, round after round, in one process: CUDA events around several calls back to back, median
over rounds. A variant that fails is named and left out, as is one that is being prepared when the script is interrupted
(Ctrl-C, SIGTERM); an interrupt while they are timed ends the rounds. Every quantized model of this package is first
compared with a dense one that has the weights it stands for. Results go to step.json after each step, then to step.png
and step-profile.png (time of GPU kernels by kind), all in --out (default benchmarks/results).
"""

import argparse
import copy
import gc
import json
import signal
import statistics
import subprocess
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step_models
import torch
import torch._inductor.config
from step_models import sqnr
from step_report import buckets, plot_profile, plot_times, table
from torch import Tensor, nn
from torch._inductor.async_compile import shutdown_compile_workers

from dirotq import set_activation_bits
from dirotq.dirotq_core.config import DiRotQConfig

# name: (model, activation bits of ours, how it runs)
VARIANTS: dict[str, tuple[str, int, str]] = {
    "bf16": ("dense", 0, "eager"),
    "bf16-compiled": ("dense", 0, "compiled"),
    "bf16-reduce-overhead": ("dense", 0, "reduce-overhead"),
    "bf16-graph": ("dense", 0, "graph"),
    "ours-r64": ("r64", 4, "eager"),
    "ours-r64-compiled": ("r64", 4, "compiled"),
    "ours-r64-reduce-overhead": ("r64", 4, "reduce-overhead"),
    "ours-r64-graph": ("r64", 4, "graph"),
    "ours-r64-a8": ("r64", 8, "eager"),
    "ours-r64-a8-compiled": ("r64", 8, "compiled"),
    "ours-r64-a8-reduce-overhead": ("r64", 8, "reduce-overhead"),
    "ours-r64-codebook-compiled": ("codebook", 4, "compiled"),
    "ours-eighth-compiled": ("eighth", 4, "compiled"),
    "ours-eighth-reduce-overhead": ("eighth", 4, "reduce-overhead"),
    "torchao-fp8-compiled": ("torchao-fp8", 0, "compiled"),
    "torchao-fp8-reduce-overhead": ("torchao-fp8", 0, "reduce-overhead"),
    "torchao-int8-compiled": ("torchao-int8", 0, "compiled"),
    "bnb-nf4": ("bnb-nf4", 0, "eager"),
    "bnb-nf4-compiled": ("bnb-nf4", 0, "compiled"),
    "paper": ("paper", 4, "eager"),
    "paper-compiled": ("paper", 4, "compiled"),
}
OURS = {
    "r64": DiRotQConfig(rank=64),
    "codebook": DiRotQConfig(rank=64, activation_format="codebook"),
    "eighth": DiRotQConfig(high_fraction=0.125),
    "paper": DiRotQConfig(method="paper"),
}
CALLS = 3  # in a row between two events


def isolate(model: nn.Module) -> None:
    """Give the blocks of `model` code of their own, so that no other model's compiled graphs are looked up first."""
    classes: dict[type, type] = {}
    for module in model.modules():
        cls = type(module)
        if cls.__name__ in model._repeated_blocks:
            if cls not in classes:
                old: Any = cls.forward
                new = types.FunctionType(
                    old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__
                )
                new.__kwdefaults__ = old.__kwdefaults__
                classes[cls] = type(cls.__name__, (cls,), {"forward": new, "__module__": cls.__module__})
            module.__class__ = classes[cls]


class Variant:
    """One way to run a model; `step()` runs it once."""

    def __init__(self, name: str, model: nn.Module, arguments: dict[str, Any], cuda: bool):
        _, self.bits, self.kind = VARIANTS[name]
        self.name, self.model, self.arguments, self.cuda = name, model, arguments, cuda
        self.graph: Any = None
        self.blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]
        self.compiled = [None] * len(self.blocks)
        self.first_seconds = 0.0

    def prepare(self) -> None:
        """Compile, capture, run until nothing is left to compile."""
        with step_models.inductor(VARIANTS[self.name][0]):
            self._prepare()

    def _prepare(self) -> None:
        start = time.perf_counter()
        if self.kind != "eager":
            # One fixed size: a dynamic one would be measured instead after the first change of size.
            mode = {"mode": self.kind} if self.kind == "reduce-overhead" else {}
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False, **mode)
            self.compiled = [block._compiled_call_impl for block in self.blocks]
        self.select()
        self.run()
        self.synchronize()
        self.first_seconds = time.perf_counter() - start
        for _ in range(3 if self.kind == "reduce-overhead" else 1):
            self.run()
        if self.kind == "graph":
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                self.run()
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.run()
            self.graph.replay()
            if not torch.equal(self.output, self.run()):
                raise AssertionError(f"{self.name}: the replayed graph gives another result")

    def select(self) -> None:
        if self.bits:
            set_activation_bits(self.model, self.bits)
        for block, compiled in zip(self.blocks, self.compiled, strict=True):
            block._compiled_call_impl = compiled

    @torch.no_grad()
    def run(self) -> Tensor:
        if self.kind == "reduce-overhead" and not self.bits:  # ours say themselves where a step begins
            torch.compiler.cudagraph_mark_step_begin()
        return self.model(**self.arguments)[0]

    def step(self) -> Tensor:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.output

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self) -> float:
        """Of one step, over CALLS in a row."""
        self.select()
        self.step()
        self.synchronize()
        if not self.cuda:
            start = time.perf_counter()
            self.step()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(CALLS):
            self.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / CALLS

    def host_milliseconds(self) -> float:
        """Until the call returns, the GPU not waited for."""
        self.select()
        self.synchronize()
        start = time.perf_counter()
        self.step()
        elapsed = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return elapsed

    def peak_bytes(self) -> int:
        """The model's tensors and what a step adds to them at most."""
        if not self.cuda:
            return 0
        self.select()
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run()
        self.synchronize()
        return model_bytes(self.model) + torch.cuda.max_memory_allocated() - before

    def profile(self) -> dict[str, float]:
        """Microseconds of each GPU kernel in one step, by name.

        A kernel that was launched while the one before it ends counts from that end on, so that all add up to the time
        in which the GPU is busy.
        """
        from torch.profiler import ProfilerActivity, profile

        self.select()
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as trace:
            self.step()
            self.synchronize()
        if not self.cuda:
            return {e.key: e.self_cpu_time_total for e in trace.key_averages() if e.self_cpu_time_total}
        kernels = (e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        found: dict[str, float] = {}
        busy_until = 0.0
        for start, end, name in sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels):
            found[name] = found.get(name, 0.0) + max(0.0, end - max(start, busy_until))
            busy_until = max(busy_until, end)
        return found


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, also of those inside a tensor subclass or beside a packed weight."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        state = getattr(tensor, "quant_state", None)
        if hasattr(tensor, "__tensor_flatten__"):
            total += sum(getattr(tensor, part).nbytes for part in tensor.__tensor_flatten__()[0])
        else:
            total += tensor.nbytes
        for part in (state, getattr(state, "state2", None)):
            total += sum(t.nbytes for t in vars(part).values() if isinstance(t, Tensor)) if part is not None else 0
    return total


def build(name: str, dense: nn.Module) -> nn.Module:
    model = copy.deepcopy(dense)
    if name in OURS:
        return step_models.dirotq(model, OURS[name])
    return step_models.PEERS[name](model, step_models.four_bit_linears(dense))


@torch.no_grad()
def check(name: str, model: nn.Module, dense: nn.Module, arguments: dict[str, Any]) -> dict[str, float]:
    """Output SQNR in dB by activation bits, against a dense model with the weights that `model` stands for."""
    twin = step_models.dequantized(dense, model)
    reference = twin(**arguments)[0]
    found = {"weights_db": sqnr(reference, dense(**arguments)[0])}
    for bits in (16, 8, 4):
        set_activation_bits(model, bits)
        found[f"a{bits}_db"] = sqnr(model(**arguments)[0], reference)
    if not found["a16_db"] > 25 or not found["a8_db"] > found["a4_db"] > 3:
        raise AssertionError(f"{name} is not the model it stands for: {found}")
    return found


def attempt(label: str, action: Callable[[], Any]) -> Any:
    """The result of `action`; None, and why, if it fails or is interrupted: one peer must not end the run."""
    start = time.perf_counter()
    try:
        result = action()
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc(limit=-4)
        print(f"{label} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if isinstance(error, KeyboardInterrupt):  # the signal may have ended the compiler's helpers; new ones are made
            try:
                shutdown_compile_workers()
            except subprocess.TimeoutExpired:  # of helpers that are alive and busy
                traceback.print_exc(limit=-4)
        return None
    print(f"  {label}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def rounds(ready: list[Variant], count: int) -> dict[str, list[float]]:
    """Milliseconds of each of `ready`, by turns; an interrupt after the first round ends them and loses nothing."""
    times: dict[str, list[float]] = {variant.name: [] for variant in ready}
    for done in range(count):
        try:
            found = {variant.name: variant.milliseconds() for variant in ready}
        except KeyboardInterrupt:
            if not done:
                raise
            print(f"interrupted: {done} of {count} rounds", flush=True)
            break
        for label, ms in found.items():
            times[label].append(ms)
    return times


def measure(name: str, size: str, arguments: argparse.Namespace, device: str, save: Callable[[dict], None]) -> None:
    pixels, batch = map(int, size.split("x"))
    cuda, begun = device == "cuda", time.perf_counter()
    dense = step_models.dense(name, arguments.tiny, device)
    made: dict[str, nn.Module] = {"dense": dense}
    call = step_models.inputs(name, arguments.tiny, pixels, batch, device)
    result: dict[str, Any] = {"model": name, "pixels": pixels, "batch": batch, "checks": {}, "variants": {}}
    chosen = [v for v in arguments.variants if v in VARIANTS]
    print(f"{name} {size}", flush=True)
    for key in dict.fromkeys(VARIANTS[v][0] for v in chosen if VARIANTS[v][0] != "dense"):
        model = attempt(f"build {key}", lambda key=key: build(key, dense))
        if model is None:
            continue
        if key in OURS and not arguments.no_check:
            found = attempt(f"check {key}", lambda key=key, model=model: check(key, model, dense, call))
            if found is None:
                continue
            result["checks"][key] = found
            print(f"  {found}", flush=True)
        made[key] = model
    for model in made.values():
        isolate(model)
    ready: list[Variant] = []
    for label in chosen:
        if VARIANTS[label][0] not in made:
            continue
        if time.perf_counter() - begun > arguments.prepare_seconds:
            print(f"{label} is left out: {arguments.prepare_seconds} s are over")
            continue
        variant = Variant(label, made[VARIANTS[label][0]], call, cuda)
        if attempt(f"prepare {label}", lambda variant=variant: variant.prepare() or True):
            ready.append(variant)
    times = rounds(ready, arguments.rounds)
    for variant in ready:
        values = sorted(times[variant.name])
        found = {
            "ms": statistics.median(values),
            "ms_low": values[0],
            "ms_high": values[-1],
            "rounds": len(values),
            "host_ms": statistics.median(variant.host_milliseconds() for _ in range(3)),
            "first_call_s": variant.first_seconds,
            "weight_bytes": model_bytes(variant.model),
            "peak_bytes": variant.peak_bytes(),
        }
        if not arguments.no_profile:
            kernels = variant.profile()
            found["buckets_ms"] = buckets(kernels)
            top = sorted(kernels.items(), key=lambda item: -item[1])[:24]
            found["kernels_ms"] = {key[:120]: value / 1e3 for key, value in top}
        result["variants"][variant.name] = found
    save(result)
    print(table(result), flush=True)


def key_of(step: dict[str, Any]) -> tuple:
    return step["model"], step["pixels"], step["batch"], step.get("note")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["flux", "pixart"], choices=["flux", "pixart"])
    parser.add_argument("--sizes", nargs="+", default=["1024x1"], metavar="PIXELSxBATCH")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--prepare-seconds", type=float, default=1e9, help="of a size: what is not begun by then is left out"
    )
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the dequantized model")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script without a GPU")
    parser.add_argument("--note", help="which run this is; a step of step.json is replaced by one of the same run")
    parser.add_argument("--append", action="store_true", help="keep the other steps in step.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.config.recompile_limit = 32
    torch._inductor.config.compile_threads = min(16, torch.get_num_threads() * 2)
    setting = {**step_models.setting("diffusers", "torchao", "bitsandbytes"), "unit": "ms, median"}
    print(json.dumps(setting), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "step.json"
    steps: list[dict] = json.loads(file.read_text())["steps"] if arguments.append and file.exists() else []

    def save(result: dict) -> None:
        noted = {**setting, **result, **({"note": arguments.note} if arguments.note else {})}
        steps[:] = [s for s in steps if key_of(s) != key_of(noted)] + [noted]
        file.write_text(json.dumps({"steps": steps}, indent=1) + "\n")

    for name in arguments.models:
        for size in arguments.sizes:
            attempt(f"{name} {size}", lambda name=name, size=size: measure(name, size, arguments, device, save))
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
    plot_times(steps, arguments.out / "step.png")
    plot_profile(steps, arguments.out / "step-profile.png")


if __name__ == "__main__":
    main()
