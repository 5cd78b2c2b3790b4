"""The model card of a quantized checkpoint: README.md with the Hub's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .base_model import CARD_NAME, BaseModel
from .card_metrics import evaluation_text
from .files import INDEX_NAME, WEIGHTS_NAME, read_json
from .inspect import Inspection, LinearRow, bits_text, inspect_checkpoint
from .methods import method

#: In every card of ours. A card without it is the user's and is never written over.
MARKER = "<!-- Written by dirotq. It is written anew when the model is, unless you remove this line. -->"
#: In the cards that diffusers writes by itself.
DIFFUSERS_MARKER = "This model card has been automatically generated"
#: Transformer class → pipeline to name where a checkpoint is a transformer alone.
PIPELINES = {"FluxTransformer2DModel": "FluxPipeline", "PixArtTransformer2DModel": "PixArtSigmaPipeline"}
#: Pipelines that make an image from words alone; others want an image as well.
TEXT_TO_IMAGE = ("FluxPipeline", "PixArtSigmaPipeline", "PixArtAlphaPipeline")
WORST = 3

_METHODS = {
    "dirotq": "DiRotQ's subspace ([arXiv 2605.16732](https://arxiv.org/abs/2605.16732)) with a block Hadamard rotation",
    "paper": "DiRotQ as published ([arXiv 2605.16732](https://arxiv.org/abs/2605.16732))",
    "hadamard": "randomized block Hadamard rotation ([arXiv 2404.00456](https://arxiv.org/abs/2404.00456))",
    "svdquant": "SVDQuant ([arXiv 2411.05007](https://arxiv.org/abs/2411.05007))",
}


def is_users(readme: Path) -> bool:
    """Whether the file is there and neither dirotq nor diffusers has written it."""
    return readme.is_file() and is_users_text(readme.read_bytes())


def is_users_text(card: bytes) -> bool:
    """Whether neither dirotq nor diffusers has written this card."""
    return MARKER.encode() not in card and DIFFUSERS_MARKER.encode() not in card


def write_card(
    path: str | Path, base: BaseModel | None = None, repo_id: str | None = None, name: str | None = None,
    evaluation: str | Path | None = None,
) -> Path | None:  # fmt: skip
    """Write README.md into the folder of a quantized transformer or pipeline; None if the user's own is there.

    Args:
        path: the folder. base: what it was made of. repo_id: where it will be on the Hub, for the examples. name: of
            the folder when it is not the present one. evaluation: report.json of an evaluation of it, or its folder.

    Raises:
        CheckpointError: it is not a DiRotQ checkpoint. ValueError: it is a single file, or `evaluation` does not
            hold this model.
    """
    readme = Path(path) / CARD_NAME
    if Path(path).is_file():
        raise ValueError(f"{path} is a single file; a card stands in a folder, and `dirotq push` writes one for a file")
    text = card_text(path, base, repo_id, name, evaluation)
    if is_users(readme):
        return None
    readme.write_text(text, encoding="utf-8")
    return readme


def card_text(
    path: str | Path, base: BaseModel | None = None, repo_id: str | None = None, name: str | None = None,
    evaluation: str | Path | None = None,
) -> str:  # fmt: skip
    """The card of a checkpoint (folder or single file), as `write_card` writes it. Errors as there."""
    from huggingface_hub import ModelCardData

    path, base = Path(path), base or BaseModel()
    found = inspect_checkpoint(path)
    pipeline = _pipeline(path)
    name = repo_id or name or path.resolve().name
    metadata = ModelCardData(**_metadata(found, base, pipeline)).to_yaml()
    sections = [
        f"---\n{metadata}\n---",
        MARKER,
        f"# {name.split('/')[-1]}",
        _summary(found, base),
        _table(found, path),
        _diffusers(found, base, pipeline, name) if path.is_dir() else "",
        _comfyui(path, repo_id),
        _quality(found.rows, evaluation_text(evaluation, path) if evaluation else ""),
        _licence(base),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def _pipeline(path: Path) -> str | None:
    index = path / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return name if isinstance(name, str) else None


def _metadata(found: Inspection, base: BaseModel, pipeline: str | None) -> dict[str, Any]:
    bits = sorted({r.scheme.split("A")[0][1:] for r in found.rows})
    data: dict[str, Any] = {"library_name": "diffusers"}
    if base.name:
        data |= {"base_model": base.name, "base_model_relation": "quantized"}
    data["pipeline_tag"] = (
        "text-to-image" if (pipeline or PIPELINES[found.model_class]) in TEXT_TO_IMAGE else "image-to-image"
    )
    data["tags"] = [
        "dirotq",
        "quantized",
        *(f"{b}-bit" for b in bits),
        f"w{bits[0]}a{bits_text(found.activation_bits)}",
    ]
    data["tags"].append("comfyui")
    return data | base.metadata


def _summary(found: Inspection, base: BaseModel) -> str:
    what = f"[{base.name}](https://huggingface.co/{base.name})" if base.name else f"A `{found.model_class}`"
    return (
        f"{what} with its transformer quantized by **dirotq**: {found.average_bits:.2f} bits per parameter on average, "
        "everything that stayed in 16 bit counted."
    )


def _table(found: Inspection, path: Path) -> str:
    config = found.config
    schemes: dict[str, int] = {}
    for row in found.rows:
        schemes[row.scheme] = schemes.get(row.scheme, 0) + 1
    ranks = sorted({r.rank for r in found.rows if r.rank})
    low_rank = "none" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    rows = [
        ("method", f"`{config.method}`: {_METHODS.get(config.method, method(config.method).source)}"),
        ("linears", ", ".join(f"{n} × {scheme}" for scheme, n in sorted(schemes.items()))),
        ("width of the 16-bit branch", low_rank),
        ("rounding", str(config.rounding)),
        (
            "activations",
            f"{bits_text(found.activation_bits)} bit; `dirotq.set_activation_bits(pipe, …)` changes that when it runs",
        ),
        ("transformer", f"{_size(found.total_bytes)} (bf16: {_size(2 * found.parameters)})"),
    ]
    if (path / "model_index.json").is_file():
        rows.append(("whole pipeline", _size(sum(f.stat().st_size for f in path.rglob("*.safetensors")))))
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _variant(transformer: Path) -> str | None:
    """The variant that `from_pretrained` must be given for the weights in this folder; None without."""
    if any((transformer / file).is_file() for file in (WEIGHTS_NAME, INDEX_NAME)):
        return None
    stem, _, suffix = WEIGHTS_NAME.rpartition(".")
    pattern = re.compile(rf"{stem}\.([\w.-]+?)(-\d{{5}}-of-\d{{5}})?\.{suffix}")
    found = {m[1] for file in transformer.iterdir() if (m := pattern.fullmatch(file.name))}
    return found.pop() if len(found) == 1 else None


def _diffusers(found: Inspection, base: BaseModel, pipeline: str | None, name: str) -> str:
    variant = _variant(found.folder)
    arguments = f'"{name}", ' + (f'variant="{variant}", ' if variant else "") + "torch_dtype=torch.bfloat16"
    if pipeline:
        load = f'pipe = {pipeline}.from_pretrained({arguments}).to("cuda")'
        imports = f"from diffusers import {pipeline}"
    else:
        outer = PIPELINES[found.model_class]
        imports = f"from diffusers import {', '.join(sorted([outer, found.model_class]))}"
        load = (
            f"transformer = {found.model_class}.from_pretrained({arguments})\n"
            f'pipe = {outer}.from_pretrained("{base.name or "the base model"}", transformer=transformer, '
            'torch_dtype=torch.bfloat16)\npipe.to("cuda")'
        )
    wanted = pipeline or PIPELINES[found.model_class]
    draw = 'image = pipe("a lighthouse at dusk").images[0]' if wanted in TEXT_TO_IMAGE else ""
    return (
        "## In diffusers\n\n`import dirotq` teaches diffusers the format; without it the error reads *Unknown "
        "quantization type, got dirotq*.\n\n```python\n"
        + f"import dirotq\nimport torch\n{imports}\n\n{load}\n{draw}".rstrip()
        + "\n```"
    )


def _comfyui(path: Path, repo_id: str | None) -> str:
    how = [f"with `repo_id` set to `{repo_id}`"] if repo_id else []
    how.append(f"with {'this file' if path.is_file() else 'this folder'} in `models/diffusion_models`")
    return (
        "## In ComfyUI\n\nThe node *Load DiRotQ Model* of the node pack of the same name, "
        + ", or ".join(how)
        + ". Text encoders and VAE are loaded by ComfyUI's own nodes."
    )


def _quality(rows: Sequence[LinearRow], evaluation: str) -> str:
    parts = [part for part in (evaluation, _linears(rows)) if part]
    if not parts:
        parts = ["Not measured: the model was quantized without calibration, or its report is not here."]
    return "## Quality\n\n" + "\n\n".join(parts)


def _linears(rows: Sequence[LinearRow]) -> str:
    known = [(r.output_db, r.name) for r in rows if r.output_db is not None and not math.isnan(r.output_db)]
    if not known:
        return ""
    # W4A16 linears, which see one row per image, would only lift the median.
    main = [db for r in rows if (db := r.output_db) is not None and not r.scheme.endswith("A16")]
    worst = ", ".join(f"`{name}` {db:.1f} dB" for db, name in sorted(known)[:WORST])
    return (
        "Signal-to-quantization-noise ratio of the quantized linears' outputs on calibration tokens that were held out:"
        f" median {median(main or [db for db, _ in known]):.1f} dB; lowest: {worst}."
    )


def _licence(base: BaseModel) -> str:
    if not base.name:
        return ""
    name = base.metadata.get("license_name") or base.metadata.get("license")
    link = base.metadata.get("license_link")
    terms = f"[{name}]({link})" if name and link else f"{name}" if name else "its licence, which its card states"
    text = f"## Licence\n\nThese weights are a derivative of {base.name} and stay under {terms}."
    return text + (f" {base.name} is gated: its terms hold here as well." if base.gated else "")
