"""Does an image show its scene? Measured from the pixels alone, without any model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from .scenes import AREAS, CENTROID_Y, COLOURS, RELATIONS, SHAPES, Scene, contains

_COLOUR_TOLERANCE = 60.0  # RGB distance to the named colour; the closest two names are 90 apart
_FOREGROUND = 45.0  # RGB distance from the background that makes a pixel part of an object
_SPECK = 0.004  # of the canvas: smaller foreground islands are ignored
_OVERLAP = 0.75  # intersection over union with the ideal shape, below which it is none of the shapes
_SIZE_LIMIT = math.sqrt(AREAS["small"] * AREAS["large"])


@dataclass(frozen=True)
class SceneScore:
    """What of the caption the image shows. `count`: exactly two objects are visible."""

    background: bool
    count: bool = False
    colour: bool = False
    shape: bool = False
    size: bool = False
    position: bool = False

    @property
    def ok(self) -> bool:
        return all((self.background, self.count, self.colour, self.shape, self.size, self.position))


@dataclass(frozen=True)
class _Found:
    """An object seen in the image; x, y its centroid in canvas units, None where nothing is recognized."""

    colour: str | None
    shape: str | None
    size: str
    x: float
    y: float


def check(image: Image.Image | np.ndarray, scene: Scene) -> SceneScore:
    """Compare an RGB image (PIL, or uint8 [size, size, 3]) with the scene its caption asked for."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3:
        raise ValueError(f"expected a square RGB image, got an array of shape {pixels.shape}")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _colour_name(ground) == scene.background

    islands = _islands(np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND)
    if len(islands) != 2:
        return SceneScore(background)
    found = [_recognize(pixels, island) for island in islands]
    return max((_compare(background, first, second, scene) for first, second in permutations(found)), key=_rank)


def _rank(score: SceneScore) -> tuple[bool, int]:
    return score.ok, score.colour + score.shape + score.size + score.position


def _compare(background: bool, first: _Found, second: _Found, scene: Scene) -> SceneScore:
    pairs = ((first, scene.first), (second, scene.second))
    dx, dy = RELATIONS[scene.relation]
    x, y = first.x - second.x, first.y - second.y
    along, across = x * dx + y * dy, x * dy + y * dx
    return SceneScore(
        background,
        count=True,
        colour=all(seen.colour == thing.colour for seen, thing in pairs),
        shape=all(seen.shape == thing.shape for seen, thing in pairs),
        size=all(seen.size == thing.size for seen, thing in pairs),
        position=along > abs(across),
    )


def _colour_name(rgb: np.ndarray) -> str | None:
    distance, name = min((float(np.linalg.norm(rgb - np.array(c))), name) for name, c in COLOURS.items())
    return name if distance < _COLOUR_TOLERANCE else None


def _islands(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a boolean mask, as masks, specks left out."""
    # A pixel takes the majority of its 3 × 3 neighbourhood, so that noise neither bridges nor frays objects.
    mask = np.sum([_shifted(mask, i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0) >= 5
    # Every pixel starts with a number of its own; the largest floods its region, along rows and columns in turn.
    labels, before = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), None
    while before is None or not np.array_equal(labels, before):
        labels, before = _flooded(_flooded(labels).T).T, labels
    names, counts = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, count in zip(names, counts, strict=True) if count > _SPECK * mask.size]


def _flooded(labels: np.ndarray) -> np.ndarray:
    """Every run of numbers in a row, between zeros, as its largest number."""
    flat = np.pad(labels, ((0, 0), (0, 1))).ravel()  # a zero ends each row
    begins = np.diff(flat > 0, prepend=False) & (flat > 0)
    largest = np.maximum.reduceat(flat, np.flatnonzero(begins)) if begins.any() else flat
    flooded = np.where(flat > 0, largest[np.cumsum(begins) - 1], 0)
    return flooded.reshape(len(labels), -1)[:, :-1]


def _shifted(a: np.ndarray, down: int, right: int) -> np.ndarray:
    """The array moved by at most one pixel, zeros coming in."""
    h, w = a.shape
    return np.pad(a, 1)[1 - down : 1 - down + h, 1 - right : 1 - right + w]


def _recognize(pixels: np.ndarray, island: np.ndarray) -> _Found:
    n = len(island)
    grid = (np.arange(n) + 0.5) / n
    rows, columns = np.nonzero(island)
    x, y = grid[columns].mean(), grid[rows].mean()
    area = len(rows) / island.size

    def overlap(shape: str) -> float:
        scale = math.sqrt(area)
        v = (grid[:, None] - y) / scale + CENTROID_Y[shape]
        ideal = contains(shape, (grid[None, :] - x) / scale, v)
        return float((ideal & island).sum() / (ideal | island).sum())

    best, shape = max((overlap(shape), shape) for shape in SHAPES)
    return _Found(
        colour=_colour_name(np.median(pixels[island], axis=0)),
        shape=shape if best > _OVERLAP else None,
        size="large" if area > _SIZE_LIMIT else "small",
        x=float(x),
        y=float(y),
    )
