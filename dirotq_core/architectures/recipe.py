"""The form of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockRecipe:
    """One kind of block.

    Attributes:
        sites: groups of linears, named relative to the block, that read the same tensor.
        modulation: linears that see one row per image (adaLN): W4A16.
        returns: the names under which the next block takes what a block returns, in order; the last one is the image's.
            All other arguments are the same for every block.
    """

    sites: tuple[tuple[str, ...], ...]
    modulation: tuple[str, ...] = ()
    returns: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Recipe:
    """`blocks` maps the name of a ModuleList of blocks to its recipe; everything else stays in 16 bit.

    shared: names of modules whose outputs all blocks read.
    """

    blocks: Mapping[str, BlockRecipe]
    shared: tuple[str, ...] = ()

    def groups(self, linears: Mapping[str, nn.Linear]) -> Iterator[tuple[list[str], bool]]:
        """(names present in `linears`, is modulation) of each group of each block, in block order.

        A member that is missing is left out of its group: variants drop some (FLUX's last double block keeps all,
        `context_pre_only` blocks do not).
        """
        for stack, block in self.blocks.items():
            depth = 1 + max((int(n.split(".")[1]) for n in linears if n.startswith(stack + ".")), default=-1)
            for i in range(depth):
                for group in block.sites:
                    yield [n for n in (f"{stack}.{i}.{m}" for m in group) if n in linears], False
                for member in block.modulation:
                    yield [n for n in (f"{stack}.{i}.{member}",) if n in linears], True
