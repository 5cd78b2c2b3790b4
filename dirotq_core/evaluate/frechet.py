"""FID (Heusel et al. 2017): features of Inception v3, and the Fréchet distance of their Gaussians."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .images import opening

#: Side of the network's input, and width of its features.
SIDE, WIDTH = 299, 2048
#: Pictures whose features are one file, and one batch of the network.
CHUNK = 64
#: Below so many pictures the covariance is singular, and the distance depends on their number more than on the model.
ENOUGH = 2048 + 1

#: uint8 [B, 3, 299, 299] → features [B, 2048].
Extractor = Callable[[torch.Tensor], torch.Tensor]


def load_extractor(device: str) -> Extractor:
    """torch-fidelity's conversion of the original network. ValueError if its weights cannot be had."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(WIDTH)]).to(device)
    except (OSError, RuntimeError, ImportError) as error:
        raise ValueError(f"metric 'fid' cannot be loaded: {str(error).strip().splitlines()[0]}") from error

    @torch.no_grad()
    def extract(batch: torch.Tensor) -> torch.Tensor:
        return network(batch.to(device))[0].float().cpu()

    return extract


def resized(file: Path) -> torch.Tensor:
    """uint8 [3, 299, 299]: Pillow's antialiased bicubic, which clean-fid (Parmar et al. 2022) takes, too."""
    from PIL import Image

    with opening(file), Image.open(file) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


@dataclass(frozen=True)
class Chunk:
    """Some pictures of a set, and the file for their features. stamp: a text that changes with the pictures."""

    files: tuple[Path, ...]
    target: Path

    @property
    def stamp(self) -> str:
        stats = [f.stat() for f in self.files]
        return "\n".join(f"{f.name} {s.st_size} {s.st_mtime_ns}" for f, s in zip(self.files, stats, strict=True))

    def features(self) -> np.ndarray | None:
        """float32 [pictures, 2048] as extracted before, None if that was not done or of other pictures."""
        try:
            with np.load(self.target, allow_pickle=False) as saved:
                return saved["features"] if str(saved["stamp"]) == self.stamp else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def save(self, features: np.ndarray) -> None:
        from ..engine.journal import write_atomically

        buffer = io.BytesIO()
        np.savez(buffer, features=features, stamp=np.array(self.stamp))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.target, buffer.getvalue())


def chunks(files: Sequence[Path], folder: Path) -> list[Chunk]:
    """`files` in parts, whose features are files in `folder`."""
    starts = range(0, len(files), CHUNK)
    return [Chunk(tuple(files[i : i + CHUNK]), folder / f"{i // CHUNK:05d}.npz") for i in starts]


def extract(parts: Sequence[Chunk], extractor: Extractor, label: str, progress: bool) -> None:
    """Write the features of `parts` that are missing."""
    with tqdm(parts, desc=label, unit=f"×{CHUNK} images", disable=not progress) as bar:
        for part in bar:
            if part.features() is None:
                part.save(extractor(torch.stack([resized(f) for f in part.files])).numpy())


def gather(parts: Sequence[Chunk]) -> np.ndarray:
    """Features [P, 2048] of all pictures of `parts`, which were extracted."""
    found = [part.features() for part in parts]
    missing = next((p.target for p, f in zip(parts, found, strict=True) if f is None), None)
    if missing is not None:
        raise ValueError(f"{os.fspath(missing)} is missing or of other pictures")
    return np.concatenate([f for f in found if f is not None])


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """‖μx − μy‖² + tr(Σx + Σy − 2 (Σx Σy)^½) of features [P, W], in float64, unbiased covariances.

    tr (Σx Σy)^½ is the sum of the singular values of Σx^½ Σy^½: real and at least 0 without a correction, also where
    there are fewer pictures than features.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of at least 2 features of one width are needed, got {x.shape} and {y.shape}")
    (mx, ax), (my, ay) = _root(x), _root(y)
    # Σ = aᵀa for a [P, W], so Σx^½ Σy^½ has the singular values of ax ayᵀ.
    cross = np.linalg.svd(ax @ ay.T, compute_uv=False).sum()
    return float(np.sum((mx - my) ** 2) + np.sum(ax**2) + np.sum(ay**2) - 2 * cross)


def _root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [W], and a with aᵀa the covariance, of at most W rows."""
    x = x.astype(np.float64)
    mean = x.mean(0)
    a = (x - mean) / np.sqrt(len(x) - 1)
    if len(a) > a.shape[1]:
        a = np.asarray(np.linalg.qr(a, mode="r"))
    return mean, a
