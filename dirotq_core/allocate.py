"""Activation bits for each site by dynamic programming: RobuQ's AMPN (arXiv 2509.23582)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def allocate_bits(costs: Sequence[Mapping[int, float]], layers: Sequence[int], average: float) -> list[int]:
    """The bits of each site with the least sum of costs whose average over layers is at most `average`.

    Args:
        costs: per site, bits → cost (not negative infinity, not NaN; what costs infinity is not taken).
        layers: per site, how many layers read it; each counts once in the average.
        average: the budget; of equal sums that with fewer bits is taken.

    Raises:
        ValueError: lengths differ, a site has no choice, a number is out of range, or the budget is below the smallest
            choice of every site, or of every finite cost.
    """
    if len(costs) != len(layers) or not costs or not all(costs):
        raise ValueError(
            f"{len(costs)} sites with costs and {len(layers)} with layers; each site needs layers and a choice of bits"
        )
    if any(n < 1 for n in layers) or any(b < 1 or math.isnan(c) for site in costs for b, c in site.items()):
        raise ValueError("layers and bits must be at least 1, and costs numbers")
    budget = math.floor(average * sum(layers) + 1e-9)
    fewest = sum(n * min(site) for n, site in zip(layers, costs, strict=True))
    if budget < fewest:
        raise ValueError(f"an average of {average} bits is below {fewest / sum(layers):g}, the fewest there can be")
    # best[c]: least cost of the sites so far with exactly c bits in all; taken[i][c]: what site i has then.
    best, taken = {0: 0.0}, []
    for n, site in zip(layers, costs, strict=True):
        after: dict[int, float] = {}
        choice: dict[int, int] = {}
        for used, cost in best.items():
            for bits, own in site.items():
                total = used + n * bits
                if total <= budget and cost + own < after.get(total, math.inf):
                    after[total], choice[total] = cost + own, bits
        if not after:
            raise ValueError(f"no choice of bits with finite costs has an average of at most {average}")
        best = after
        taken.append(choice)
    left = min(best, key=lambda c: (best[c], c))
    out = []
    for n, choice in zip(reversed(layers), reversed(taken), strict=True):
        out.append(choice[left])
        left -= n * out[-1]
    return out[::-1]


@torch.no_grad()
def sensitivities(
    sites: Sequence[Any], formats: Mapping[int, str], run: Callable[[], torch.Tensor]
) -> list[dict[int, float]]:
    """How much each choice of bits at one site alone changes what the model puts out: the mean squared difference.

    Args:
        sites: modules with an `activation`, the name of a format or None for 16 bit. formats: bits → name.
        run: draws the model's output; the same inputs every time. All sites are at 16 bit meanwhile but the one.
    """
    before = [site.activation for site in sites]
    try:
        for site in sites:
            site.activation = None
        reference = run().double()
        out = []
        for site in sites:
            costs = {}
            for bits, name in formats.items():
                site.activation = name
                costs[bits] = float((run().double() - reference).square().mean())
            site.activation = None
            out.append(costs)
    finally:
        for site, name in zip(sites, before, strict=True):
            site.activation = name
    return out
