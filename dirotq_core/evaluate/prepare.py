"""What an evaluation needs, opened and tried before anything is drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.dist import World
from . import frechet
from .draw import free_memory
from .images import find_images, real_images
from .judge.run import Docket, tasks, try_judge
from .metrics import METRICS, check_installed, load_scorer
from .options import EvaluationOptions
from .prompt_sets import Prompt
from .subjects import (
    Subject,
    check_architectures,
    check_names,
    is_quantized,
    open_subject,
    parse_subject,
    with_activation_bits,
)

logger = logging.getLogger(__name__)

#: The control's row.
CONTROL = "reference, other seeds"
#: Device → a judge: something to call with messages, which has an `identity`.
MakeJudge = Callable[[str], Any]


def prepare(
    models: Sequence[str],
    reference: str,
    prompts: Sequence[Prompt],
    out: Path,
    options: EvaluationOptions,
    judge: MakeJudge | None,
    world: World,
) -> list[Subject]:
    """The reference, the control and the models; whatever can be found wrong without drawing is.

    Raises:
        ValueError, ImportError, JudgeError: as of `evaluate`.
    """
    check_installed(options.metrics)
    _check_counts(prompts, options)
    first = open_subject(*parse_subject(reference), out / "converted")
    if first.kind == "transformer":
        raise ValueError(f"{first.path} is a transformer alone; the reference must be a pipeline or a folder of images")
    if is_quantized(first):
        logger.warning(
            "the reference %s is itself quantized: differences to it are none to a model in 16 bit", first.path
        )
    opened = [open_subject(*parse_subject(m), out / "converted") for m in models]
    check_architectures(first, opened)
    subjects = [first]
    if (options.control or judge) and first.kind == "images":
        logger.warning("there will be no control: the reference %s is a folder of images", first.path)
    elif options.control or judge:
        subjects.append(replace(first, name=CONTROL, control=True))
    subjects += with_activation_bits(opened, options.activation_bits)
    check_names(subjects)
    for subject in subjects:
        if subject.kind == "images":  # the others draw what is missing
            find_images(subject.name, subject.path, (p.id for p in prompts))
    for name in options.metrics:  # weights that cannot be had are missed before hours of drawing
        if METRICS[name].modules:
            load_scorer(name, "cpu") if METRICS[name].load else frechet.load_extractor("cpu")
    if judge is not None:
        _try(judge(world.device(options.device)), subjects, prompts, out)
        free_memory()
    return subjects


def check_out(out: Path, sources: Sequence[str], real: Path | None) -> None:
    """ValueError if `out` is in a folder that is read: what a run writes would become part of the next one's input."""
    folders = [Path(parse_subject(s)[1]) for s in sources] + ([real] if real is not None else [])
    inside = next((f for f in folders if f.is_dir() and out.resolve().is_relative_to(f.resolve())), None)
    if inside is not None:
        raise ValueError(f"{out} is in {inside}, which is read; give a folder to write outside of it")


def _check_counts(prompts: Sequence[Prompt], options: EvaluationOptions) -> None:
    """ValueError unless FID has the pictures that it needs, and `real` is a folder of them."""
    counts = {"prompts": len(prompts)}
    if options.real is not None:
        counts["real images"] = len(real_images(options.real, [p.id for p in prompts] if options.real_by_id else None))
    few = next((what for what, count in counts.items() if count < 2), None)
    if "fid" in options.metrics and few is not None:
        raise ValueError(f"FID needs at least 2 {few}, got {counts[few]}")


def _try(judge: Any, subjects: Sequence[Subject], prompts: Sequence[Prompt], out: Path) -> None:
    """JudgeError if the judge does not answer. Not asked if all is judged: then it need not be there any more."""
    ids = [p.id for p in prompts]
    try:
        sets = [find_images(s.name, s.path if s.kind == "images" else out / "images" / s.name, ids) for s in subjects]
    except ValueError:  # there are pictures to draw, and so to judge
        return try_judge(judge)
    if any(Docket(out / "judge", s, sets[0], judge.identity).missing(tasks(prompts)) for s in sets[1:]):
        try_judge(judge)
