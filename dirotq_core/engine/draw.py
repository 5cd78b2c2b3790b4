"""The first block's inputs: the pipeline really draws, with its transformer's blocks streamed from the files.

Text encoders, scheduler and guidance are the pipeline's own, and the trajectory is the dense model's. At every step of
a batch of images each block is loaded, run on all of them, and dropped.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..architectures.recipe import BlockRecipe
from ..calibrate import held_out_prompts
from ..layout import site_seed
from .blocks import (
    Arguments,
    Block,
    batch_size,
    bind,
    call_block,
    chunk_rows,
    materialize,
    pinned,
    place_buffers,
    read_ahead,
    release,
    take_rows,
)  # fmt: skip
from .dist import World
from .journal import Journal
from .options import EngineOptions
from .pipeline import load_pipeline
from .samples import Sample, pack_samples
from .source import Source

#: The golden ratio's fraction: shifts that fill the unit interval evenly, however many images there are.
SHIFT = 0.6180339887498949


def chosen_steps(image: int, steps: int, wanted: int) -> set[int]:
    """Which of `steps` steps of an image are kept: `wanted` at equal distances, shifted from image to image."""
    if wanted >= steps:
        return set(range(steps))
    shift = image * SHIFT % 1
    return {int((i + shift) * steps / wanted) for i in range(wanted)}


def draw_inputs(
    source: Source, blocks: Sequence[Block], outer: Sequence[str], prompts: Sequence[str], call: dict[str, Any],
    seed: int, options: EngineOptions, journal: Journal, world: World, progress: bool,
) -> list[str]:  # fmt: skip
    """Draw an image per prompt and keep the first block's inputs; each batch is a part of `journal`.

    Returns:
        The names of the parts, in order.

    Raises:
        ValueError: the pipeline calls its transformer in a way that the engine does not know.
    """
    starts = range(0, len(prompts), options.draw_batch)
    parts = [f"inputs-{start:05d}" for start in starts]
    missing = [(name, start) for name, start in zip(parts, starts, strict=True) if journal.record(name) is None]
    missing = world.mine(world.share(missing))
    if missing:
        _draw_parts(source, blocks, outer, prompts, call, seed, options, journal, missing, progress)
    world.wait()
    return parts


def _draw_parts(
    source: Source, blocks: Sequence[Block], outer: Sequence[str], prompts: Sequence[str], call: dict[str, Any],
    seed: int, options: EngineOptions, journal: Journal, missing: list[tuple[str, int]], progress: bool,
) -> None:  # fmt: skip
    model = source.model(options.dtype)
    place_buffers(model, options.device)
    materialize(model, source.read(outer, options.dtype), options.device)
    pipeline = load_pipeline(source, model, options)
    held = len(prompts) - held_out_prompts(len(prompts))
    keep = partial(_keep, options=options, prompts=len(prompts), first_held_out=held)
    with (
        tqdm(desc="drawing", unit="step", disable=not progress) as bar,
        _streamed(source, model, blocks, options) as capture,
    ):
        for done, (name, start) in enumerate(missing):

            def seen(recipe: BlockRecipe, arguments: Arguments, step: int, steps: int) -> None:
                bar.total = len(missing) * steps
                bar.update(done * steps + step - bar.n)  # noqa: B023  # called before the loop goes on
                keep(recipe, arguments, step, steps, batch=batch, samples=samples)  # noqa: B023

            batch = range(start, min(start + options.draw_batch, len(prompts)))
            samples: list[Sample] = []
            with capture(pipeline, seen):
                _draw(pipeline, [prompts[i] for i in batch], batch, call, seed)
            bar.update((done + 1) * (bar.total or 0) // len(missing) - bar.n)
            tensors, form = pack_samples(samples)
            journal.commit(name, tensors, len(samples), form)
    del pipeline, model
    gc.collect()  # text encoders in cycles of hooks


def _draw(pipeline: Any, prompts: list[str], images: range, call: dict[str, Any], seed: int) -> None:
    # The same noise as `dirotq.quantize`; a batch of one is called as it calls.
    noise = [torch.Generator("cpu").manual_seed(site_seed(f"calibration {i}", seed)) for i in images]
    one = len(prompts) == 1
    pipeline(prompt=prompts[0] if one else prompts, generator=noise[0] if one else noise, output_type="latent", **call)


def _keep(
    recipe: BlockRecipe, arguments: Arguments, step: int, steps: int, *, batch: range, samples: list[Sample],
    options: EngineOptions, prompts: int, first_held_out: int,
) -> None:  # fmt: skip
    """Add the rows of one call that are wanted at this step to `samples`."""
    rows = batch_size(recipe, arguments)
    if rows % len(batch):
        raise ValueError(f"the transformer was called with {rows} rows for {len(batch)} prompts")
    size = chunk_rows(recipe, arguments, options.chunk_tokens)
    for held_out in (False, True):
        wanted = []
        for row in range(rows):
            image = batch[row % len(batch)]  # guidance stacks whole batches
            if (image >= first_held_out) == held_out and step in chosen_steps(image, steps, options.timesteps):
                wanted.append(row)
        for start in range(0, len(wanted), size):
            some = take_rows(arguments, rows, wanted[start : start + size])
            samples.append(Sample(_to_host(some), held_out))


def _to_host(value: Any) -> Any:
    """A copy on the host that does not change with the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_to_host(v) for v in value)
    return {k: _to_host(v) for k, v in value.items()} if isinstance(value, dict) else value


Keep = Callable[[BlockRecipe, Arguments, int, int], None]


@contextmanager
def _streamed(
    source: Source, model: Any, blocks: Sequence[Block], options: EngineOptions
) -> Iterator[Callable[[Any, Keep], Any]]:
    """Let the blocks of `model` fetch their weights when they are called.

    Yields a context manager within which the first block's arguments go to a function, with the step and their number.
    """
    resident = _fits(source, options)
    order = blocks if resident else itertools.cycle(blocks)
    weights = read_ahead(partial(_fetch, source, b, options) for b in order)
    state: dict[str, Any] = {"step": -1, "time": None, "keep": None, "pipeline": None}

    def forward(block: Block, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if block is blocks[0] and state["keep"] is not None:
            state["keep"](block.recipe, bind(module, args, kwargs), state["step"], _steps(state["pipeline"]))
        if any(p.is_meta for p in module.parameters()):
            materialize(model, next(weights), options.device)
        try:
            return _in_chunks(module, block.recipe, bind(module, args, kwargs), options.chunk_tokens)
        finally:
            if not resident:
                release(module)

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        time = float(bind(module, args, kwargs)["timestep"].flatten()[0])
        if time != state["time"]:
            state["time"], state["step"] = time, state["step"] + 1

    @contextmanager
    def capture(pipeline: Any, keep: Keep) -> Iterator[None]:
        state.update(step=-1, time=None, keep=keep, pipeline=pipeline)
        try:
            yield
        finally:
            state["keep"] = None

    modules = {b.name: model.get_submodule(b.name) for b in blocks}
    counter = model.register_forward_pre_hook(count, with_kwargs=True)
    for block in blocks:
        modules[block.name].forward = partial(forward, block, modules[block.name])
    try:
        yield capture
    finally:
        weights.close()
        counter.remove()
        for module in modules.values():
            del module.forward
            release(module)


def _fetch(source: Source, block: Block, options: EngineOptions) -> dict[str, torch.Tensor]:
    return pinned(source.read(block.tensors, options.dtype), options.device)


def _fits(source: Source, options: EngineOptions) -> bool:
    """Whether the whole dense model may stay on the GPU beside what else is needed."""
    if not options.device.startswith("cuda"):
        return False  # where the device is the host, its blocks are views of the files
    free = torch.cuda.mem_get_info(options.device)[0] / 1e9
    size = sum(e.bytes for e in source.entries.values()) / 1e9
    return size < 0.6 * min(free, options.max_gpu_memory or free)


def _steps(pipeline: Any) -> int:
    return len(torch.unique_consecutive(torch.as_tensor(pipeline.scheduler.timesteps)))


@torch.no_grad()
def _in_chunks(module: nn.Module, recipe: BlockRecipe, arguments: Arguments, tokens: int) -> Any:
    """What the block returns, some rows of the batch at a time."""
    rows = batch_size(recipe, arguments)
    size = chunk_rows(recipe, arguments, tokens)
    parts = [
        call_block(module, recipe, take_rows(arguments, rows, range(start, min(start + size, rows))))
        for start in range(0, rows, size)
    ]
    joined = {name: torch.cat([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}
    values = tuple(joined[name] for name in recipe.returns)
    return values if len(values) > 1 else values[0]
