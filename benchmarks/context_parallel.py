"""One FLUX.1-dev picture on several GPUs with diffusers' context parallelism, beside the same on one.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py [--steps 4] [--pixels 1024] [--compile] [--tiny]

Every process holds the whole quantized transformer (real shape, random weights, rank 64) and a part of the tokens.
Each first draws alone, then together with the others, by Ulysses (heads exchanged) and by ring attention, from the same
noise with the same text; --schemes xdit does it with xDiT's transformer class, if xfuser is installed. The pictures
need not have equal bits: products of fewer rows add in another order, and a code at a tie turns on it. So they are
compared by what quantized activations cost in the first place, one GPU's picture against its own at 16-bit
activations. Process 0 writes results/context_parallel/GPUS.json. --tiny tries it on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import step_models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline

from dirotq import DiRotQConfig, set_activation_bits

RESULTS = Path(__file__).parent / "results" / "context_parallel"
SCHEMES = ("ulysses", "ring", "xdit")


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Decibels of `expected` over the difference; None where there is no difference."""
    error = (found.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / error)) if error else None


class Drawing:
    """FLUX.1 without text encoders and VAE: from fixed embeddings to latents."""

    def __init__(self, transformer: Any, args: argparse.Namespace, device: str):
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        )
        self.pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
        self.pipe.set_progress_bar_config(disable=True)
        given = step_models.inputs("flux", args.tiny, args.pixels, 1, device)
        side = 128 if args.tiny else args.pixels
        self.call = {
            "prompt_embeds": given["encoder_hidden_states"], "pooled_prompt_embeds": given["pooled_projections"],
            "latents": given["hidden_states"], "height": side, "width": side, "num_inference_steps": args.steps,
            "output_type": "latent",
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.pipe(**self.call).images

    def seconds(self, repeats: int) -> float:
        """Median seconds of a step: those of a picture, over its steps."""
        times = []
        for _ in range(repeats):
            _together()
            begin = time.perf_counter()
            self()
            _together()
            times.append(time.perf_counter() - begin)
        return statistics.median(times) / self.call["num_inference_steps"]


def _together() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def transformer_on(args: argparse.Namespace, device: str) -> Any:
    """The quantized transformer, with process 0's weights."""
    model = step_models.dirotq(step_models.dense("flux", args.tiny, device), DiRotQConfig(rank=64))
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.data, 0)
    return model


def parallel(model: Any, scheme: str, count: int) -> None:
    if model._parallel_config is not None:
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(model, model._cp_plan)
        model._parallel_config = None
    config = ContextParallelConfig(**{f"{scheme}_degree": count})
    # diffusers asks for the number of accelerators, of which the CPU is none.
    with mock.patch("torch.accelerator.device_count", lambda: max(torch.cuda.device_count(), 1)):
        model.enable_parallelism(config=config)


def with_xdit(model: Any, args: argparse.Namespace, device: str) -> Any:
    """The transformer as xDiT's class, which splits the tokens itself; loaded from a checkpoint, as a user would."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import (
        get_runtime_state,
        init_distributed_environment,
        initialize_model_parallel,
        initialize_runtime_state,
    )
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    rank, count = dist.get_rank(), dist.get_world_size()
    names = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(names)
    if rank == 0:
        model.save_pretrained(names[0])
    dist.barrier()
    made = xFuserFlux1Transformer2DWrapper.from_pretrained(names[0], torch_dtype=torch.bfloat16, device_map=device)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(names[0])
    init_distributed_environment(rank=rank, world_size=count)
    initialize_model_parallel(sequence_parallel_degree=count, ulysses_degree=count)
    engine, _ = xFuserArgs(model="FLUX.1", ulysses_degree=count, attention_backend="sdpa").create_config()
    initialize_runtime_state(FluxPipeline(None, None, None, None, None, None, made), engine)
    text = step_models.inputs("flux", args.tiny, args.pixels, 1, device)["encoder_hidden_states"].shape[1]
    get_runtime_state().set_input_parameters(
        batch_size=1, num_inference_steps=args.steps, max_condition_sequence_length=text, split_text_embed_in_sp=True
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--backend", default="native", help="attention backend of diffusers (default %(default)s)")
    parser.add_argument("--ring-backend", default="_native_cudnn", help="that of ring attention (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile_repeated_blocks")
    parser.add_argument("--schemes", choices=SCHEMES, nargs="+", default=["ulysses", "ring"])
    parser.add_argument("--out", type=Path, help="a JSON file (default: results/context_parallel/GPUS.json)")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try the script")
    args = parser.parse_args()
    if args.tiny:  # ring attention wants a kernel that the CPU has not
        args.schemes = [s for s in args.schemes if s != "ring"]
    dist.init_process_group("gloo" if args.tiny else "nccl")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = "cpu"
    if not args.tiny:
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    model = transformer_on(args, device)
    drawing = Drawing(model, args, device)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    model.set_attention_backend(args.backend)
    set_activation_bits(model, 16)
    exact = drawing()
    alone = {}
    for bits in args.bits:
        set_activation_bits(model, bits)
        drawing()
        alone[bits] = drawing(), drawing.seconds(args.repeats)
    rows = []
    for scheme in args.schemes:
        if scheme == "xdit":
            model = with_xdit(model, args, device)
            drawing = Drawing(model, args, device)
        else:
            model.set_attention_backend(args.ring_backend if scheme == "ring" else args.backend)
            parallel(model, scheme, count)
        for bits in args.bits:
            set_activation_bits(model, bits)
            drawing()
            latents, one = alone[bits]
            found, seconds = drawing(), drawing.seconds(args.repeats)
            row = {
                "scheme": scheme, "activation_bits": bits, "gpus": count, "seconds_per_step": seconds,
                "seconds_per_step_alone": one, "speedup": one / seconds, "efficiency": one / seconds / count,
                "db_to_one_gpu": sqnr(found, latents), "db_of_quantized_activations": sqnr(latents, exact),
            }  # fmt: skip
            rows.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
    if rank == 0:
        out = args.out or RESULTS / f"{count}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        head = {"device": "cpu" if args.tiny else torch.cuda.get_device_name(), "torch": torch.__version__}
        head |= {k: getattr(args, k) for k in ("pixels", "steps", "compile", "backend", "ring_backend", "tiny")}
        out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()
    wrong = [r for r in rows if (db := r["db_to_one_gpu"]) is not None and db < r["db_of_quantized_activations"] - 3]
    if wrong:
        raise SystemExit(f"farther from one GPU's picture than quantized activations explain: {wrong}")


if __name__ == "__main__":
    main()
