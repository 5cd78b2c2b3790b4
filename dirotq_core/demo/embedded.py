"""The embedded models: two tiny trained text-to-image pipelines that travel with the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scenes import Scene, sample_scenes

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

MAX_TOKENS = 32  # the text length the models are trained with
_FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True)
class EmbeddedModel:
    """A pipeline's folder, class, and the arguments it is meant to be called with."""

    name: str
    pipeline: str
    transformer: str
    call: dict[str, Any] = field(hash=False)

    @property
    def folder(self) -> Path:
        return _FOLDER / self.name


_CALL = {"height": 128, "width": 128, "num_inference_steps": 20, "max_sequence_length": MAX_TOKENS}

MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(
            "pixart-sigma-tiny",
            "PixArtSigmaPipeline",
            "PixArtTransformer2DModel",
            # The binning knows only the sizes of the large models; the cleaning wants two more packages.
            {**_CALL, "guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False},
        ),
        EmbeddedModel("flux-tiny", "FluxPipeline", "FluxTransformer2DModel", {**_CALL, "guidance_scale": 3.5}),
    )
}


def get(name: str) -> EmbeddedModel:
    try:
        return MODELS[name]
    except KeyError:
        raise ValueError(f"unknown embedded model {name!r}, expected one of {', '.join(MODELS)}") from None


def load_pipeline(
    name: str,
    torch_dtype: torch.dtype | None = None,
    transformer: torch.nn.Module | None = None,
    folder: Path | None = None,
) -> DiffusionPipeline:
    """The pipeline of an embedded model; `transformer` replaces its own, `folder` the one in the package."""
    import diffusers

    model = get(name)
    own = {} if transformer is None else {"transformer": transformer}
    pipeline = getattr(diffusers, model.pipeline).from_pretrained(
        str(folder or model.folder), torch_dtype=torch_dtype, local_files_only=True, **own
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(n: int, seed: int, held_out: bool = True) -> list[Scene]:
    """n scenes to draw, by default with captions no embedded model has seen; `scene.caption()` is the prompt."""
    return sample_scenes(n, seed, held_out=held_out)
