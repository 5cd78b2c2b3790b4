"""A transformer as a sequence of blocks, of which one at a time has weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..architectures import recipe_for
from ..architectures.recipe import BlockRecipe
from ..layout import SitePlan

T = TypeVar("T")

#: Threads that read a block for a GPU: one alone copies 3 to 5 GB/s out of the page cache.
READERS = 4

#: Arguments of a block's forward, by name.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One block: its full name, recipe, sites, and the names of its dense tensors."""

    name: str
    recipe: BlockRecipe
    sites: tuple[SitePlan, ...]
    tensors: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(s.in_features * sum(s.out_features) for s in self.sites)


def cut_into_blocks(model: nn.Module, plans: Sequence[SitePlan]) -> tuple[list[Block], list[str]]:
    """The blocks of `model` in the order in which they run, and the names of the tensors outside of them."""
    names = list(model.state_dict())
    blocks = []
    for stack, recipe in recipe_for(model).blocks.items():
        for i in range(len(model.get_submodule(stack))):  # type: ignore[arg-type]
            name = f"{stack}.{i}"
            sites = tuple(p for p in plans if p.owner.startswith(name + "."))
            blocks.append(Block(name, recipe, sites, tuple(n for n in names if n.startswith(name + "."))))
    inside = {n for b in blocks for n in b.tensors}
    return blocks, [n for n in names if n not in inside]


def materialize(model: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Put tensors into `model` by full name, on `device`."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = tensor.to(device, non_blocking=True)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, leaf, tensor)


def place_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Put buffers that are in no file (PixArt's position embeddings) on `device`."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def release(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; shapes stay, and so do buffers, which may be in no file."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not p.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def bind(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a call of `block` by name."""
    bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    return {name: value for name, value in bound.items() if name != "self"}


def call_block(block: nn.Module, recipe: BlockRecipe, arguments: Arguments) -> Arguments:
    """Run the forward of the class of `block`; its results by the names under which the next block takes them.

    Raises ValueError if it returns something else than the recipe says.
    """
    accepted = inspect.signature(type(block).forward).parameters
    # The class's own, past whatever else stands in for it.
    result = type(block).forward(block, **{name: value for name, value in arguments.items() if name in accepted})
    values = result if isinstance(result, tuple) else (result,)
    if len(values) != len(recipe.returns):
        raise ValueError(
            f"{type(block).__name__} returned {len(values)} tensors where its recipe has {', '.join(recipe.returns)}; "
            "this version of diffusers is not supported by the engine"
        )
    return dict(zip(recipe.returns, values, strict=True))


def batch_size(recipe: BlockRecipe, arguments: Arguments) -> int:
    return len(arguments[recipe.returns[-1]])


def chunk_rows(recipe: BlockRecipe, arguments: Arguments, tokens: int) -> int:
    """How many rows of a batch make about `tokens` tokens; at least 1."""
    per_row = sum(arguments[name].shape[1] for name in recipe.returns)
    return max(1, tokens // per_row)


def take_rows(arguments: Arguments, batch: int, rows: Sequence[int]) -> Arguments:
    """The arguments of some rows of a batch: tensors whose first dimension is the batch, all else as it is.

    Nested tensors (rotary embeddings) belong to all rows.
    """
    if list(rows) == list(range(batch)):
        return arguments
    index = torch.tensor(rows)
    return {
        name: v[index.to(v.device)] if isinstance(v, torch.Tensor) and v.ndim and len(v) == batch else v
        for name, v in arguments.items()
    }


def to_device(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


def read_ahead(jobs: Iterator[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of `jobs` in order; the next one runs on a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dirotq-read") as pool:
        ahead = None
        for job in jobs:
            following = pool.submit(job)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def pinned(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Really read, and in memory that a GPU copies from at full speed, if the device is one."""
    if not device.startswith("cuda"):
        return tensors
    with ThreadPoolExecutor(READERS) as pool:  # copies let go of the interpreter
        return dict(zip(tensors, pool.map(lambda t: t.contiguous().pin_memory(), tensors.values()), strict=True))
