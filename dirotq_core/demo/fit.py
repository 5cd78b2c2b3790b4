"""Minimizing a loss: AdamW, a moving average of the weights, and an early end where nothing is learned any more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

EMA = 0.999
CHECKPOINT_EVERY = 2000
#: A smoothed loss so many times its lowest is no noise.
WORST = 5.0
#: Batches on which the averaged weights are compared with the trained ones.
CHECKED = 8

Curve = list[tuple[int, float]]


class Fit(NamedTuple):
    """How a training went: the smoothed loss after some steps, and the loss of the averaged weights at the end."""

    curve: Curve
    average: float


class Diverged(RuntimeError):
    """The loss is not finite, or far above what it was; `curve` up to there."""

    def __init__(self, message: str, curve: Curve):
        super().__init__(message)
        self.curve = curve


def progress(items: Iterable, total: int, what: str) -> Iterable:
    """The items, with twenty lines of progress in all."""
    start = time.time()
    for i, item in enumerate(items, 1):
        yield item
        if i % max(1, total // 20) == 0:
            print(f"{what}: {i}/{total}, {time.time() - start:.0f} s", flush=True)


def fit(
    modules: list[nn.Module],
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    what: str,
    checkpoint: Callable[[], None] = lambda: None,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> Fit:
    """Minimize `loss` with AdamW, cosine decay after a warm-up; leave the moving average of the weights.

    `checkpoint` is called with the average in place. Raises `Diverged` where the loss, or that of the average, says so.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warmup = min(300, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup),
        ],
        milestones=[warmup],
    )

    @torch.no_grad()
    def swap() -> None:
        """Exchange the weights with their moving average, where they lie: compiled graphs may know the addresses."""
        for p, a in zip(parameters, average, strict=True):
            kept = p.clone()
            p.copy_(a)
            a.copy_(kept)

    device = parameters[0].device.type
    recent = torch.zeros((), device=device)
    curve: Curve = []
    look = max(1, min(50, steps // 20))
    for step in progress(range(1, steps + 1), steps, what):
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        # The average forgets the start quickly, then keeps about a thousand steps.
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(1 - EMA, 1 / step))
        recent.lerp_(value.detach().float(), max(0.01, 1 / step))
        if step % look == 0 or step == steps:
            curve.append((step, recent.item()))
            _check(curve, what)
        if step % max(1, steps // 20) == 0:
            print(f"{what}: loss {recent.item():.5f}", flush=True)
        if step % checkpoint_every == 0:
            swap()
            checkpoint()
            swap()
    swap()
    return Fit(curve, _average_loss(loss, device, curve, what))


def _check(curve: Curve, what: str) -> None:
    step, now = curve[-1]
    where = f"{what}: the loss is {now:.5f} at step {step}"
    if not math.isfinite(now):
        last = f"it was {curve[-2][1]:.5f} at step {curve[-2][0]}" if len(curve) > 1 else "it never was finite"
        raise Diverged(f"{where}; {last}", curve)
    before, lowest = min(curve, key=lambda point: point[1])
    if now > WORST * lowest:
        raise Diverged(f"{where}, over {WORST:g} times the lowest, {lowest:.5f} at step {before}", curve)


@torch.no_grad()
def _average_loss(loss: Callable[[], Tensor], device: str, curve: Curve, what: str) -> float:
    """The loss of the averaged weights, without compiled graphs; the generators stay as they are."""
    own = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(own), torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16):
        value = sum(float(loss()) for _ in range(CHECKED)) / CHECKED
    if not value <= WORST * curve[-1][1]:
        end = f"over {WORST:g} times the {curve[-1][1]:.5f} that training ended with"
        raise Diverged(f"{what}: the averaged weights have a loss of {value:.5f}, {end}", curve)
    return value
