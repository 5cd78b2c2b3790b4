"""Scores of all pictures, each on disk as soon as it is there; every process scores its share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..engine.dist import World
from . import frechet
from .images import ImageSet, real_images
from .metrics import METRICS, Scorer, load_scorer
from .options import EvaluationOptions
from .prompt_sets import Prompt
from .store import Results

THREADS = min(8, os.cpu_count() or 1)


def score_images(
    name: str, sets: Sequence[ImageSet], reference: ImageSet, prompts: Sequence[Prompt], folder: Path,
    options: EvaluationOptions, world: World,
) -> dict[str, np.ndarray]:  # fmt: skip
    """One metric of every picture: set's name → scores [P]. A metric of pairs leaves the reference itself out.

    ValueError names a picture whose score is not there when all should be, as when it was changed meanwhile.
    """
    metric = METRICS[name]
    sets = [s for s in sets if not (metric.of_pairs and s is reference)]
    scorer = None
    for images in sets:
        results = Results(folder / images.name, name, world.rank)
        todo = [p for p in prompts if results.get(p.id, _stamp(images, reference, p, metric.of_pairs)) is None]
        todo = world.mine(world.share(todo))
        if not todo:
            continue
        scorer = scorer or load_scorer(name, world.device(options.device))
        label = f"{metric.label} of {images.name}"
        # A network computes one picture at a time, arithmetic on the host several.
        threads = 1 if metric.modules else THREADS
        score = partial(_score, scorer, images, reference)
        with (
            results.writing() as put,
            tqdm(total=len(todo), desc=label, unit="image", disable=not options.progress) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):
            for prompt, value in zip(todo, pool.map(score, todo), strict=True):
                put(prompt.id, _stamp(images, reference, prompt, metric.of_pairs), value)
                bar.update()
    world.wait()
    table = {}
    for images in sets:
        results = Results(folder / images.name, name)  # with what the other processes have written
        values = [results.get(p.id, _stamp(images, reference, p, metric.of_pairs)) for p in prompts]
        lost = next((p.id for p, value in zip(prompts, values, strict=True) if value is None), None)
        if lost is not None:
            raise ValueError(f"{results.folder} has no {metric.label} of {images.files[lost]}; was it changed?")
        table[images.name] = np.array(values, float)
    return table


def _score(scorer: Scorer, images: ImageSet, reference: ImageSet, prompt: Prompt) -> float:
    return scorer(images.load(prompt.id), reference.load(prompt.id), prompt.text)


def _stamp(images: ImageSet, reference: ImageSet, prompt: Prompt, of_pairs: bool) -> str:
    if of_pairs:
        return f"{images.stamp(prompt.id)} {reference.stamp(prompt.id)}"
    return f"{images.stamp(prompt.id)} {hashlib.sha256(prompt.text.encode()).hexdigest()[:16]}"


def distances(
    sets: Sequence[ImageSet], reference: ImageSet, folder: Path, options: EvaluationOptions, world: World
) -> dict[str, dict[str, float]]:
    """FID of every set: "fid" against the reference's pictures, "fid_real" against real ones if there are any."""
    parts = {s.name: frechet.chunks(list(s.files.values()), folder / s.name / "fid") for s in sets}
    if options.real is not None:
        # A name that no set can have.
        ids = list(reference.files) if options.real_by_id else None
        parts["/real"] = frechet.chunks(real_images(options.real, ids), folder / "real images")
    missing = {name: [c for c in some if c.features() is None] for name, some in parts.items()}
    missing = {name: world.mine(world.share(some)) for name, some in missing.items()}
    if any(missing.values()):
        extractor = frechet.load_extractor(world.device(options.device))
        for name, some in missing.items():
            frechet.extract(some, extractor, f"features of {name.strip('/')}", options.progress)
    world.wait()
    if not world.first:
        return {}
    features = {name: frechet.gather(some) for name, some in parts.items()}
    found: dict[str, dict[str, float]] = {s.name: {} for s in sets}
    for images in sets:
        if images is not reference:
            found[images.name]["fid"] = frechet.frechet_distance(features[images.name], features[reference.name])
        if "/real" in features:
            found[images.name]["fid_real"] = frechet.frechet_distance(features[images.name], features["/real"])
    return found
