"""A FLUX.1 small enough to train in a test, in the shape ComfyUI wants: it draws eight scenes into latents of 8 × 8.

A scene is a colour (a vector of the 16 latent channels) on a shape; the prompt names both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import FluxTransformer2DModel

from .stand_ins import TextEncoder

COLOURS = ("red", "green", "blue", "yellow")
SIDE, CHANNELS = 8, 16
STEPS, BATCH, RATE = 150, 16, 2e-3
#: ComfyUI shows and saves FLUX.1's latents as x / 0.3611 + 0.1159.
SCALE, SHIFT = 0.3611, 0.1159


def scenes() -> dict[str, torch.Tensor]:
    """Prompt → latent [16, 8, 8] of unit size, as the model sees it."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 3.5, torch.arange(SIDE) - 3.5, indexing="ij")
    shapes = {"circle": x**2 + y**2 < 9, "square": (x.abs() < 3) & (y.abs() < 3) & ~((x.abs() < 1) & (y.abs() < 1))}
    colours = torch.randn(len(COLOURS), CHANNELS, 1, 1, generator=torch.Generator().manual_seed(11))
    return {
        f"a {colour} {shape}": value * (2.0 * mask - 1)
        for colour, value in zip(COLOURS, colours, strict=True)
        for shape, mask in shapes.items()
    }


def scene_of(latent: torch.Tensor) -> str:
    """The prompt whose scene a saved latent [1, 16, 8, 8] is nearest to."""
    x = (latent[0].float() - SHIFT) * SCALE
    return min(scenes().items(), key=lambda item: float((x - item[1]).square().sum()))[0]


def packed(x: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] as tokens [B, H W / 4, 4 C] of 2 × 2."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def image_ids() -> torch.Tensor:
    return torch.cartesian_prod(torch.zeros(1), torch.arange(SIDE / 2), torch.arange(SIDE / 2))


def conditions(prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the stand-in encoder makes of prompts, as the model's arguments."""
    encoder = TextEncoder()
    made = [encoder.encode_from_tokens(encoder.tokenize(p), return_pooled=True) for p in prompts]
    text, pooled = (torch.cat(parts) for parts in zip(*made, strict=True))
    return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(text.shape[1], 3)}


def train(model: FluxTransformer2DModel) -> Iterator[float]:
    """Flow matching, the loss of each step; `model` is float32 and changed in place."""
    g = torch.Generator().manual_seed(0)
    prompts, targets = list(scenes()), torch.stack(list(scenes().values()))
    given = conditions(prompts)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        which = torch.randint(len(prompts), (BATCH,), generator=g)
        time = torch.rand(BATCH, generator=g)
        noise, clean = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=g), targets[which]
        sigma = time[:, None, None, None]
        velocity = model(
            hidden_states=packed((1 - sigma) * clean + sigma * noise), timestep=time, img_ids=image_ids(),
            encoder_hidden_states=given["encoder_hidden_states"][which], txt_ids=given["txt_ids"],
            pooled_projections=given["pooled_projections"][which], guidance=torch.full((BATCH,), 3.5),
        ).sample  # fmt: skip
        loss = (velocity - packed(noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
