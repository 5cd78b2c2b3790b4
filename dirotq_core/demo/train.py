"""Train the embedded models: python -m dirotq.dirotq_core.demo.train --out DIR

Everything is learned here from drawn scenes: the autoencoder first, then the transformer together with its text
encoders. On one GPU this takes some minutes; `--only pixart` and `--only flux` can run side by side.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import architectures
from .checker import check
from .embedded import MAX_TOKENS, MODELS, load_pipeline, prompts
from .fit import Fit, fit, progress
from .scenes import Scene, draw, sample_scenes

SEED = 0
VAE_BATCH = 128
CAPTION_DROP = 0.1  # share of captions replaced by the empty one, for guidance
GUIDANCE = (1.0, 5.0)  # the range FLUX's guidance embedding is distilled over
STEPS = {"pixart": 26_000, "flux": 16_000}


def render(scenes: list[Scene]) -> Tensor:
    """uint8 [n, 3, 128, 128], drawn by all processor cores."""
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(_draw, enumerate(scenes), chunksize=256)
        images = np.stack(list(progress(drawn, len(scenes), "drawing")))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _draw(job: tuple[int, Scene]) -> np.ndarray:
    seed, scene = job
    return np.asarray(draw(scene, seed=seed))


def train_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int, batch: int) -> Tensor:
    """Fit the autoencoder, if steps > 0; set its latent scale; return the latents [n, 4, 32, 32] of all images."""

    def pick(index: Tensor) -> Tensor:
        return images[index].to(torch.float32).div(127.5).sub(1).contiguous(memory_format=torch.channels_last)

    def loss() -> Tensor:
        x = pick(torch.randint(len(images), (batch,), device=images.device))
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    vae.to(memory_format=torch.channels_last)
    if steps:
        fit([vae], loss, steps, 2e-3, "autoencoder")
    vae.requires_grad_(False).to(memory_format=torch.contiguous_format)
    chunks = torch.arange(len(images), device=images.device).split(500)
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        latents = torch.cat([vae.encode(pick(index)).latent_dist.mode().float() for index in chunks])
        error = F.mse_loss(vae.decode(latents[:500]).sample.float(), pick(chunks[0])[:500])
    print(f"autoencoder: PSNR {10 * torch.log10(4 / error).item():.1f} dB", flush=True)
    shift = latents.mean().item() if vae.config.shift_factor is not None else 0.0
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=shift)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return (latents - shift) * vae.config.scaling_factor


def tokenize(tokenizer, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [n + 1, MAX_TOKENS]; the last row is the empty caption."""
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def pick_captions(index: Tensor) -> Tensor:
    """The rows of the captions, some replaced by the empty one (-1)."""
    return torch.where(torch.rand(index.shape, device=index.device) < CAPTION_DROP, -1, index)


def train_pixart(
    pipe: PixArtSigmaPipeline,
    latents: Tensor,
    captions: list[str],
    steps: int,
    batch: int,
    lr: float,
    checkpoint: Callable[[], None],
    teacher: nn.Module | None = None,
) -> Fit:
    """Noise prediction at uniform timesteps. The variance half of the output, which the sampler ignores, stays 0.

    With a teacher, a trained transformer, its prediction of the noise is learned instead of the noise itself.

    The scene is decided at high noise, where an error of the noise weighs little in the plain loss and much in the
    image. The weight 1/ᾱ, which makes it the loss of v-prediction, is therefore applied up to a limit.
    """
    device = latents.device
    ids, mask = tokenize(pipe.tokenizer, captions, device)
    alphas = pipe.scheduler.alphas_cumprod.to(device)
    weights = (1 / alphas).clamp(max=50)
    weights /= weights.mean()

    def loss() -> Tensor:
        index = torch.randint(len(latents), (batch,), device=device)
        rows = pick_captions(index)
        x, noise = latents[index], torch.randn(batch, *latents.shape[1:], device=device)
        t = torch.randint(len(alphas), (batch,), device=device)
        a = alphas[t].view(-1, 1, 1, 1)
        inputs = {
            "hidden_states": a.sqrt() * x + (1 - a).sqrt() * noise,
            "encoder_hidden_states": pipe.text_encoder(ids[rows], attention_mask=mask[rows])[0],
            "encoder_attention_mask": mask[rows],
            "timestep": t,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        target = noise
        if teacher is not None:
            with torch.no_grad():
                target = teacher(**inputs).sample.chunk(2, dim=1)[0].float()
        error = (pipe.transformer(**inputs).sample.chunk(2, dim=1)[0].float() - target).square().mean((1, 2, 3))
        return (weights[t] * error).mean()

    return fit(trained(pipe), loss, steps, lr, "pixart", checkpoint)


def train_flux(
    pipe: FluxPipeline,
    latents: Tensor,
    captions: list[str],
    steps: int,
    batch: int,
    lr: float,
    checkpoint: Callable[[], None],
    teacher: nn.Module | None = None,
) -> Fit:
    """Rectified flow, then, as in FLUX.1-dev, distillation of guidance into the guidance embedding.

    With a teacher, a trained transformer, its velocities at every guidance are learned instead.
    """
    device = latents.device
    clip_ids, _ = tokenize(pipe.tokenizer, captions, device)
    t5_ids, _ = tokenize(pipe.tokenizer_2, captions, device)
    packed = pipe._pack_latents(latents, len(latents), *latents.shape[1:])
    side = latents.shape[-1] // 2
    img_ids = pipe._prepare_latent_image_ids(1, side, side, device, torch.float32)
    txt_ids = torch.zeros(MAX_TOKENS, 3, device=device)
    models = nn.ModuleList(trained(pipe))

    def velocity(models: nn.ModuleList, x: Tensor, sigma: Tensor, rows: Tensor, guidance: Tensor) -> Tensor:
        transformer, clip, t5 = models
        return transformer(
            x,
            encoder_hidden_states=t5(t5_ids[rows])[0],
            pooled_projections=clip(clip_ids[rows]).pooler_output,
            timestep=sigma,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=txt_ids,
        ).sample.float()

    def noisy() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = torch.randint(len(latents), (batch,), device=device)
        x, noise = packed[index], torch.randn(batch, *packed.shape[1:], device=device)
        # Logit-normal, shifted as the scheduler shifts the sampling steps at this sequence length.
        sigma = torch.sigmoid(torch.randn(batch, device=device) + pipe.scheduler.config.base_shift)
        s = sigma.view(-1, 1, 1)
        return (1 - s) * x + s * noise, sigma, noise - x, pick_captions(index)

    if teacher is not None:
        trained_models = nn.ModuleList([teacher, *trained(pipe)[1:]])

        def teacher_loss() -> Tensor:
            x, sigma, _, rows = noisy()
            guidance = torch.empty(batch, device=device).uniform_(*GUIDANCE)
            with torch.no_grad():
                target = velocity(trained_models, x, sigma, rows, guidance)
            return F.mse_loss(velocity(models, x, sigma, rows, guidance), target)

        return fit([models], teacher_loss, steps, lr, "flux", checkpoint)

    one = torch.ones(batch, device=device)

    def flow_loss() -> Tensor:
        x, sigma, target, rows = noisy()
        return F.mse_loss(velocity(models, x, sigma, rows, one), target)

    fit([models], flow_loss, steps - steps // 6, lr, "flux", checkpoint)
    frozen = copy.deepcopy(models).requires_grad_(False)

    def guidance_loss() -> Tensor:
        x, sigma, _, rows = noisy()
        guidance = torch.empty(batch, device=device).uniform_(*GUIDANCE)
        with torch.no_grad():
            plain = velocity(frozen, x, sigma, torch.full_like(rows, -1), one)
            target = plain + guidance.view(-1, 1, 1) * (velocity(frozen, x, sigma, rows, one) - plain)
        return F.mse_loss(velocity(models, x, sigma, rows, guidance), target)

    return fit([models], guidance_loss, steps // 6, lr / 2, "flux guidance", checkpoint)


def trained(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The transformer and its text encoders, which learn together."""
    names = ("transformer", "text_encoder", "text_encoder_2")
    return [getattr(pipe, name) for name in names if hasattr(pipe, name)]


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """The ordinary diffusers folder in bf16, readable by transformers 4 and 5."""
    copies = {
        name: copy.deepcopy(module).to(torch.bfloat16) if isinstance(module, nn.Module) else module
        for name, module in pipe.components.items()
    }
    type(pipe)(**copies).save_pretrained(folder)
    for path in folder.glob("*/config.json"):  # forget where the parts were loaded from
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    _for_transformers_4(folder)


def _for_transformers_4(folder: Path) -> None:
    """Rewrite what transformers 5 saves in ways that 4 cannot read; 5 reads both."""
    # 5 has one class for both of 4's T5 tokenizers, of which the slow one would want a sentencepiece file.
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(path.read_text())
        config.pop("extra_special_tokens", None)  # an empty list, where 4 expects a dict
        path.write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.glob("tokenizer*/tokenizer.json"):
        bpe = json.loads(path.read_text())["model"]
        if bpe["type"] == "BPE":  # 4's CLIPTokenizer reads these two
            path.with_name("vocab.json").write_text(json.dumps(bpe["vocab"]))
            path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, bpe["merges"]), ""]))
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text())
        # Where no torch_dtype is asked for, diffusers loads float32, but 5 what the config says.
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        if config["model_type"] == "clip_text_model":
            weights = path.with_name("model.safetensors")
            tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()}
            save_file(tensors, weights, metadata={"format": "pt"})


def accuracy(name: str, folder: Path, n: int, device: str, **call) -> float:
    """Share of n held-out scenes that the saved pipeline draws right in every attribute."""
    pipe = load_pipeline(name, torch.bfloat16, folder=folder).to(device)
    right = 0
    scenes = prompts(n, seed=SEED)
    for start in range(0, n, 128):
        some = scenes[start : start + 128]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(some))]
        images = pipe([scene.caption() for scene in some], generator=generators, **{**MODELS[name].call, **call}).images
        right += sum(check(image, scene).ok for image, scene in zip(images, some, strict=True))
    return right / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the pipelines' folders")
    parser.add_argument("--only", choices=("pixart", "flux"), help="train one of the two")
    parser.add_argument("--resume", action="store_true", help="continue with the pipelines found in --out")
    parser.add_argument("--images", type=int, default=60_000, help="training images (default %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=3000, help="autoencoder (default %(default)s)")
    parser.add_argument("--steps", type=int, help=f"transformer (default {STEPS['pixart']}, FLUX {STEPS['flux']})")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (default %(default)s)")
    parser.add_argument("--test", type=int, default=256, help="held-out scenes drawn at the end (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models: twice as fast on a GPU")
    args = parser.parse_args()

    scenes = sample_scenes(args.images, SEED, held_out=False)
    captions = [scene.caption() for scene in scenes]
    images = render(scenes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = images.to(device)
    torch.set_float32_matmul_precision("high")
    # With cuDNN's attention allowed, FLUX's loss turned NaN within a few hundred steps (torch 2.11, H200).
    torch.backends.cuda.enable_cudnn_sdp(False)

    for name, build, train in (
        ("pixart-sigma-tiny", architectures.pixart, train_pixart),
        ("flux-tiny", architectures.flux, train_flux),
    ):
        if args.only and not name.startswith(args.only):
            continue
        folder = args.out / name
        torch.manual_seed(SEED)
        pipe = load_pipeline(name, torch.float32, folder=folder) if args.resume else build()
        pipe.to(device)
        for module in trained(pipe):
            module.train().requires_grad_(True)
            if args.compile:
                module.compile()
        latents = train_autoencoder(pipe.vae, images, 0 if args.resume else args.vae_steps, VAE_BATCH)
        checkpoint = partial(save, pipe, folder)
        steps = args.steps or STEPS[name.split("-")[0]]
        train(pipe, latents, captions, steps, args.batch, args.lr, checkpoint)
        checkpoint()
        print(f"{name}: {accuracy(name, folder, args.test, device):.1%} of {args.test} scenes right", flush=True)


if __name__ == "__main__":
    main()
