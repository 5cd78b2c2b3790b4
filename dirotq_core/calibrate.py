"""Statistics of a transformer's inputs, gathered by really running its pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from .layout import SitePlan, site_seed
from .moments import SecondMoment

#: Tokens kept per site, of held-out prompts, to measure the output error on.
HELD_OUT_TOKENS = 512
#: One prompt in this many is held out of the statistics.
HELD_OUT_EVERY = 8
#: Share of the device's free memory that statistics may take; the rest is for activations and the solver.
MEMORY_SHARE = 0.8

logger = logging.getLogger(__name__)


def held_out_prompts(prompts: int) -> int:
    """How many of so many prompts, the last ones, are held out of the statistics."""
    return max(prompts // HELD_OUT_EVERY, 1) if prompts > 1 else 0


def _statistics_go_to_host(model: torch.nn.Module, plans: Sequence[SitePlan]) -> bool:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return False
    needed = sum(p.moment_bytes for p in plans)
    free = torch.cuda.mem_get_info(device)[0]
    if needed < MEMORY_SHARE * free:
        return False
    logger.warning(
        "statistics of %.1f GB do not fit beside the model into the %.1f GB free on %s; they are summed in host "
        "memory, which is slower", needed / 1e9, free / 1e9, device,
    )  # fmt: skip
    return True


class Calibration:
    """Second moments and held-out tokens of every site of a model.

    Args:
        tokens_per_sample: at most so many tokens of each row of a batch are summed, drawn at random; None for all.

    Attributes:
        moments: per site owner, `SecondMoment`. held_out: per site owner, tokens [≤ 512, K] in the model's dtype.
        holding_out: whether what is observed next is kept as held-out tokens instead of being summed.
        rows_per_call: how many held-out tokens are kept of each call.
        kept: the held-out tokens by call. sample: a number of the present call, which random tokens depend on.
    """

    def __init__(self, model: torch.nn.Module, plans: Sequence[SitePlan], tokens_per_sample: int | None = None):
        self.model = model
        self.plans = plans
        self.tokens_per_sample = tokens_per_sample
        host = _statistics_go_to_host(model, plans)
        self.moments = {
            p.owner: SecondMoment(p.in_features, diagonal=p.transform is None, device="cpu" if host else None)
            for p in plans
        }
        self.kept: dict[str, list[torch.Tensor]] = {p.owner: [] for p in plans}
        self.ran = False
        self.sample = 0
        self.holding_out = False
        self.rows_per_call = HELD_OUT_TOKENS

    @property
    def held_out(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(rows)[:HELD_OUT_TOKENS] for name, rows in self.kept.items() if rows}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Observe the model's inputs inside the block; the hooks are gone afterwards, whatever happens."""
        handles = [
            self.model.get_submodule(p.owner).register_forward_pre_hook(self._observer(p.owner)) for p in self.plans
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observer(self, owner: str):
        def observe(module: torch.nn.Module, args: tuple) -> None:
            x = args[0].detach()
            if not self.holding_out:
                self.moments[owner].update(self._some_tokens(x, owner))
                return
            x = x.reshape(-1, x.shape[-1])
            # Evenly spaced rows of every call, so that all timesteps and both guidance halves are represented.
            rows = torch.linspace(0, len(x) - 1, min(self.rows_per_call, len(x))).long()
            self.kept[owner].append(x[rows.to(x.device)].cpu())

        return observe

    def _some_tokens(self, x: torch.Tensor, owner: str) -> torch.Tensor:
        """x [B, T, K], or [B, t, K] with t = `tokens_per_sample` tokens that depend on `sample`."""
        wanted = self.tokens_per_sample
        if wanted is None or x.ndim < 3 or x.shape[1] <= wanted:
            return x
        generator = torch.Generator().manual_seed(site_seed(owner, self.sample))
        return x[:, torch.randperm(x.shape[1], generator=generator)[:wanted].sort().values.to(x.device)]

    @torch.no_grad()
    def run(self, pipeline: Any, prompts: Sequence[str], call: dict[str, Any], seed: int, progress: bool) -> None:
        """Draw every prompt, with noise of its own that no user's seed gives. The last eighth is held out."""
        self.ran = True
        held = held_out_prompts(len(prompts))
        steps = int(call.get("num_inference_steps", 20))
        self.rows_per_call = max(1, -(-HELD_OUT_TOKENS // (max(held, 1) * steps)))
        bar = tqdm(prompts, desc="calibrating", unit="prompt", disable=not progress)
        quiet = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(disable=True)
        try:
            with self.recording():
                for i, prompt in enumerate(bar):
                    self.holding_out = i >= len(prompts) - held
                    generator = torch.Generator("cpu").manual_seed(site_seed(f"calibration {i}", seed))
                    pipeline(prompt=prompt, generator=generator, output_type="latent", **call)
        finally:
            pipeline.set_progress_bar_config(**quiet)
