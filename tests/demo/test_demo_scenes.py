"""The scenes are reproducible and split cleanly; the checker accepts them and nothing else."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dirotq.dirotq_core.demo.checker import check
from dirotq.dirotq_core.demo.scenes import (
    AREAS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    contains,
    draw,
    is_held_out,
    sample_scenes,
)

SCENE = Scene(Thing("large", "red", "circle"), "left of", Thing("small", "blue", "square"), "green")


def test_caption():
    assert SCENE.caption() == "a large red circle left of a small blue square on green"


def test_sampling_is_seeded_and_well_formed():
    scenes = sample_scenes(500, seed=3)
    assert scenes == sample_scenes(500, seed=3) != sample_scenes(500, seed=4)
    for scene in scenes:
        assert scene.first != scene.second
        assert scene.background not in (scene.first.colour, scene.second.colour)


def test_held_out_split():
    everything = [is_held_out(scene.caption()) for scene in sample_scenes(5000, seed=0)]
    assert 0.08 < np.mean(everything) < 0.12
    assert all(is_held_out(scene.caption()) for scene in sample_scenes(100, seed=0, held_out=True))
    assert not any(is_held_out(scene.caption()) for scene in sample_scenes(100, seed=0, held_out=False))


def test_drawing_is_seeded():
    assert draw(SCENE, seed=1).tobytes() == draw(SCENE, seed=1).tobytes() != draw(SCENE, seed=2).tobytes()
    assert draw(SCENE, size=64).size == (64, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_shapes_have_area_one_and_centred_boxes(shape):
    grid = (np.arange(800) + 0.5) / 400 - 1
    inside = contains(shape, grid[None, :], grid[:, None])
    assert inside.mean() * 4 == pytest.approx(1, abs=0.01)
    for axis in (0, 1):
        occupied = grid[inside.any(axis)]
        assert occupied[0] == pytest.approx(-occupied[-1], abs=0.01)


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="hexagon"):
        contains("hexagon", np.zeros(1), np.zeros(1))


def _with_one_change(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute replaced by another value."""
    what = rng.choice(["size", "colour", "shape", "relation", "background"])
    values = {"size": AREAS, "colour": COLOURS, "shape": SHAPES, "relation": RELATIONS, "background": COLOURS}[what]
    if what in ("relation", "background"):
        return replace(scene, **{what: rng.choice([v for v in values if v != getattr(scene, what)])})
    which = rng.choice(["first", "second"])
    thing = getattr(scene, which)
    other = rng.choice([v for v in values if v != getattr(thing, what)])
    return replace(scene, **{which: replace(thing, **{what: other})})


def _noise(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, 12, (*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


@pytest.mark.parametrize(
    ("disturb", "n"),
    [
        pytest.param(lambda image: image, 1000, id="as drawn"),
        pytest.param(lambda image: image.filter(ImageFilter.GaussianBlur(1.2)), 250, id="blurred"),
        pytest.param(_noise, 250, id="noisy"),
        pytest.param(_jpeg, 250, id="jpeg"),
    ],
)
def test_checker_accepts_the_scene_and_rejects_one_change(disturb, n):
    rng = random.Random(0)
    accepted = rejected = 0
    for seed, scene in enumerate(sample_scenes(n, seed=1)):
        image = disturb(draw(scene, seed=seed))
        accepted += check(image, scene).ok
        rejected += not check(image, _with_one_change(scene, rng)).ok
    assert accepted >= 0.99 * n
    assert rejected >= 0.99 * n


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        ({"first": replace(SCENE.first, size="small")}, "size"),
        ({"first": replace(SCENE.first, colour="white")}, "colour"),
        ({"second": replace(SCENE.second, shape="triangle")}, "shape"),
        ({"relation": "above"}, "position"),
        ({"background": "yellow"}, "background"),
    ],
)
def test_score_names_what_is_wrong(change, attribute):
    score = check(draw(SCENE, seed=0), replace(SCENE, **change))
    assert not getattr(score, attribute)
    assert sum(vars(score).values()) == len(vars(score)) - 1


@pytest.mark.parametrize("image", [Image.new("RGB", (128, 128)), np.zeros((64, 64, 3), np.uint8)])
def test_an_empty_image_shows_nothing(image):
    assert not any(vars(check(image, SCENE)).values())


def test_checker_refuses_other_arrays():
    with pytest.raises(ValueError, match=r"\(128, 64, 3\)"):
        check(np.zeros((128, 64, 3), np.uint8), SCENE)
