"""Captioned scenes of two flat shapes: the data the embedded models are trained on and judged by.

Coordinates are in canvas units: (0, 0) the upper left corner, (1, 1) the lower right, y downwards.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 60),
    "green": (45, 155, 65),
    "blue": (45, 85, 205),
    "purple": (150, 55, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle")
AREAS = {"small": 0.025, "large": 0.075}  # of the canvas; equal for all shapes of a size
# Direction from the second object to the first, (x, y).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

CENTROID_Y = {"circle": 0.0, "square": 0.0, "triangle": math.sqrt(2) / 6}  # of the unit shapes below

_OFFSET = 0.23  # of each centre from the middle of the canvas, along the relation
_JITTER_ALONG, _JITTER_ACROSS, _JITTER_SCALE = 0.025, 0.1, 0.03
_SUPERSAMPLING = 4


def contains(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie inside the unit shape: area 1, bounding box centred at the origin."""
    if shape == "circle":
        return x**2 + y**2 <= 1 / math.pi
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.5
    if shape == "triangle":  # base and height √2, apex up
        half = math.sqrt(0.5)
        return (y <= half) & (2 * abs(x) <= y + half)
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two different objects, `first` standing in `relation` to `second`, on a background of another colour."""

    first: Thing
    relation: str
    second: Thing
    background: str

    def caption(self) -> str:
        return f"a {self.first} {self.relation} a {self.second} on {self.background}"


def is_held_out(caption: str) -> bool:
    """One caption in ten, chosen by its hash: never trained on."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def _scenes(seed: int, held_out: bool | None) -> Iterator[Scene]:
    rng = random.Random(seed)

    def thing() -> Thing:
        return Thing(rng.choice(list(AREAS)), rng.choice(list(COLOURS)), rng.choice(SHAPES))

    while True:
        first, second = thing(), thing()
        free = [colour for colour in COLOURS if colour not in (first.colour, second.colour)]
        scene = Scene(first, rng.choice(list(RELATIONS)), second, rng.choice(free))
        # Of two equal objects nobody could say which is the first.
        if first != second and held_out in (None, is_held_out(scene.caption())):
            yield scene


def sample_scenes(n: int, seed: int, held_out: bool | None = None) -> list[Scene]:
    """n random scenes; `held_out` restricts them to one side of the split."""
    return list(islice(_scenes(seed, held_out), n))


def draw(scene: Scene, size: int = 128, seed: int | None = None) -> Image.Image:
    """The scene as an RGB image of size × size pixels, anti-aliased; a seed moves the objects a little."""
    rng = random.Random(seed)

    def jitter(amount: float) -> float:
        return 0.0 if seed is None else rng.uniform(-amount, amount)

    fine = size * _SUPERSAMPLING
    grid = (np.arange(fine, dtype=np.float32) + 0.5) / fine
    image = np.empty((size, size, 3), np.float32)
    image[:] = COLOURS[scene.background]
    dx, dy = RELATIONS[scene.relation]
    for thing, side in ((scene.first, 1), (scene.second, -1)):
        along, across = side * _OFFSET + jitter(_JITTER_ALONG), jitter(_JITTER_ACROSS)
        x = 0.5 + along * dx + across * dy
        y = 0.5 + along * dy + across * dx
        scale = math.sqrt(AREAS[thing.size]) * (1 + jitter(_JITTER_SCALE))
        inside = contains(thing.shape, (grid[None, :] - x) / scale, (grid[:, None] - y) / scale)
        coverage = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING).mean((1, 3))[..., None]
        image += coverage * (np.array(COLOURS[thing.colour], np.float32) - image)
    return Image.fromarray(image.round().astype(np.uint8))
