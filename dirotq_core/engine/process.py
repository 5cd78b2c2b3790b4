"""Quantizing one block: statistics from its inputs, its sites solved, its outputs for the next block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..build import replace_linears, solved_modules
from ..calibrate import HELD_OUT_TOKENS, Calibration
from ..config import DiRotQConfig
from ..input_site import SiteMemo
from ..layout import SitePlan
from ..quantize import solve_all
from ..solve import LinearReport
from .blocks import Block, call_block, materialize, release, to_device
from .dist import World
from .options import EngineOptions
from .samples import Activations
from .timing import Stopwatch


@dataclass(frozen=True)
class Workshop:
    """What the blocks of one run have in common.

    Attributes:
        activations: of this process's samples; None without calibration. held_out: how many samples of all processes
            are held out.
    """

    model: Any
    config: DiRotQConfig
    options: EngineOptions
    activations: Activations | None
    held_out: int
    world: World
    watch: Stopwatch

    @torch.no_grad()
    def quantize(
        self, block: Block, dense: Mapping[str, torch.Tensor], hand_on: bool
    ) -> tuple[dict[str, torch.Tensor], list[LinearReport]]:
        """Quantize `block`.

        Args:
            dense: its tensors by full name. hand_on: whether the activations are to become the next block's inputs.

        Returns:
            The block's tensors in the checkpoint, by full name, and the reports of its linears.
        """
        model, config = self.model, self.config
        module = model.get_submodule(block.name)
        materialize(model, dense, self.options.device)
        calibration = Calibration(model, block.sites, self.options.tokens_per_sample)
        if self.activations is not None:
            with self.watch("statistics"):
                self._observe(block, module, calibration, hand_on and not self.options.sequential)
        with self.watch("solving"):
            shares = self.world.split([_cost(s) for s in block.sites])
            mine = [block.sites[i] for i in shares[self.world.rank]]
            solved = solve_all(model, mine, config, calibration, progress=False, consume=True)[1]
        with self.watch("exchanging"):
            solved = self.world.gather(solved, shares)
        memo = SiteMemo()
        for plan, site in zip(block.sites, solved, strict=True):
            for name, quantized in solved_modules(model, plan, site, config, memo).items():
                model.set_submodule(name, quantized)
        tensors = {f"{block.name}.{name}": t.cpu() for name, t in module.state_dict().items()}
        if hand_on and self.options.sequential:
            self._run(block, module)
        release(module)
        return tensors, [report for site in solved for report in site.reports]

    @torch.no_grad()
    def replay(self, block: Block, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the activations the next block's inputs, with a block that is finished (or with its dense weights).

        Args:
            tensors: by full name; the quantized block's for sequential calibration, else the dense one's.
        """
        if self.options.sequential:
            replace_linears(self.model, list(block.sites), self.config, self.options.dtype)
        materialize(self.model, tensors, self.options.device)
        module = self.model.get_submodule(block.name)
        self._run(block, module)
        release(module)

    def _observe(self, block: Block, module: nn.Module, calibration: Calibration, hand_on: bool) -> None:
        assert self.activations is not None
        samples = self.activations.samples
        calibration.ran = True
        calibration.rows_per_call = -(-HELD_OUT_TOKENS // max(1, self.held_out))
        with calibration.recording():
            for i, sample in enumerate(samples):
                calibration.holding_out = sample.held_out
                calibration.sample = self.world.rank + i * self.world.size
                results = self._call(block, module, i)
                if hand_on:
                    self.activations.put(i, results)
        self.world.sum_statistics(calibration)

    def _run(self, block: Block, module: nn.Module) -> None:
        assert self.activations is not None
        with self.watch("outputs"):
            for i in range(len(self.activations.samples)):
                self.activations.put(i, self._call(block, module, i))

    def _call(self, block: Block, module: nn.Module, i: int) -> dict[str, Any]:
        assert self.activations is not None
        return call_block(module, block.recipe, to_device(self.activations.arguments(i), self.options.device))


def _cost(site: SitePlan) -> float:
    """Of solving a site, as far as it tells the slow ones from the others."""
    return float(site.in_features**2 * (site.in_features + sum(site.out_features))) if site.method else 0.0
