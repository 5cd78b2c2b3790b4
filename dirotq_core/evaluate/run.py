"""An evaluation from end to end: what is compared is opened, drawn, scored, judged and reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..engine.dist import World
from ..engine.journal import LOCK, ResumeError, write_atomically
from .draw import draw_subject
from .images import ImageSet, check_sizes, find_images
from .judge.protocol import ORDERS, QUESTIONS, JudgeError
from .judge.protocol import VERSION as PROTOCOL
from .judge.run import Docket, Task, tasks
from .judge.tally import Pair
from .metrics import METRICS
from .options import EvaluationOptions, meaningless
from .page import write_page
from .prepare import MakeJudge, check_out, prepare
from .prompt_sets import Prompt, digest
from .score import distances, score_images
from .subjects import Subject
from .summary import VERSION, notes, prompts_csv, summarize, table_csv


def evaluate(
    models: Sequence[str], reference: str, prompts: Sequence[Prompt], out: Path, options: EvaluationOptions,
    judge: MakeJudge | None = None, parallel: int = 1,
) -> dict[str, Any] | None:  # fmt: skip
    """Compare `models` with `reference`, and write the result into the folder `out`.

    What is there already is used: a run that was interrupted or killed goes on, and one with another metric or a judge
    draws nothing again. Of several processes (``accelerate launch``) each takes its share.

    Args:
        models: pipelines, transformers, single files, Hub ids or folders of images, as ``SOURCE`` or ``NAME=SOURCE``.
        reference: the same, of the pipeline in 16 bit.
        judge: makes a judge; None for none. parallel: questions that it is asked at a time.

    Returns:
        What ``report.json`` holds; None in processes other than the first.

    Raises:
        ValueError: something cannot be compared; named before anything is drawn, where that is possible.
        ImportError: a metric needs a package that is not installed.
        JudgeError: the judge does not answer on trial, before anything is drawn; or it failed later, and the report is
            written without it.
    """
    if not models:
        raise ValueError("no model to evaluate was given")
    check_out(out, [reference, *models], options.real)
    world = World.join()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        world.by_first(lambda: _acquire(lock, out))
        return _evaluate(models, reference, prompts, out, options, judge, parallel, world)
    finally:
        lock.release()
        world.leave()


def _acquire(lock: FileLock, out: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResumeError(f"another process is working in {out}") from error


def _evaluate(
    models: Sequence[str], reference: str, prompts: Sequence[Prompt], out: Path, options: EvaluationOptions,
    judge: MakeJudge | None, parallel: int, world: World,
) -> dict[str, Any] | None:  # fmt: skip
    subjects = world.share(world.by_first(lambda: prepare(models, reference, prompts, out, options, judge, world)))
    assert subjects is not None
    sets = [_pictures(s, subjects[0], prompts, out, options, world) for s in subjects]
    world.by_first(lambda: check_sizes(sets[1:], sets[0]))
    scores = {
        name: score_images(name, sets, sets[0], prompts, out / "scores", options, world)
        for name in METRICS
        if name in options.metrics and METRICS[name].load is not None
    }
    fid = distances(sets, sets[0], out / "scores", options, world) if "fid" in options.metrics else {}
    verdicts: dict[str, dict[str, list[Pair]]] = {}
    identity: dict[str, Any] | None = None
    problem: JudgeError | None = None
    if judge is not None:
        asked = judge(world.device(options.device))
        try:
            verdicts = {s.name: _judge(asked, s, sets[0], prompts, out, parallel, options, world) for s in sets[1:]}
            identity = {"protocol": PROTOCOL, **asked.identity}
        except JudgeError as error:  # hours of drawing and scoring are worth a report without it
            problem = error
    if not world.first:
        return None
    result = {
        "version": VERSION,
        **_about(prompts, options),
        "meaningless": meaningless(options, judged=bool(verdicts)),
        "judge": identity,
        "judge_failed": None if problem is None else str(problem),
        **summarize(subjects, scores, fid, verdicts, options.resamples),
    }
    result["notes"] = notes(result)
    _write(result, sets, prompts, scores, out, options)
    if problem is not None:
        raise JudgeError(f"{problem}; the report in {out} is without the judge") from problem
    return result


def _pictures(
    subject: Subject, reference: Subject, prompts: Sequence[Prompt], out: Path, options: EvaluationOptions, world: World
) -> ImageSet:
    if subject.kind == "images":
        return find_images(subject.name, subject.path, (p.id for p in prompts))
    return draw_subject(subject, reference, prompts, out / "images" / subject.name, options, world)


def _judge(
    judge: Any, images: ImageSet, reference: ImageSet, prompts: Sequence[Prompt], out: Path, parallel: int,
    options: EvaluationOptions, world: World,
) -> dict[str, list[Pair]]:  # fmt: skip
    everything = tasks(prompts)
    Docket(out / "judge", images, reference, judge.identity, world.rank).run(
        judge, everything, world, parallel, options.progress
    )
    # With what the others have written.
    docket = Docket(out / "judge", images, reference, judge.identity)
    world.by_first(lambda: docket.check(everything))
    if not world.first:
        return {}

    def pair(question: str, prompt: Prompt) -> Pair:
        first, second = (docket.verdict(Task(prompt, question, order)) for order in ORDERS)
        return first, second

    return {question: [pair(question, p) for p in prompts] for question in QUESTIONS}


def _about(prompts: Sequence[Prompt], options: EvaluationOptions) -> dict[str, Any]:
    import diffusers
    import torch

    package = sys.modules[(__package__ or "").removesuffix(".dirotq_core.evaluate")]
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    return {
        "versions": {"dirotq": package.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": gpu or options.device,
        "prompts": {"count": len(prompts), "digest": digest(prompts)},
        "call": options.call,
        "dtype": str(options.dtype).removeprefix("torch."),
        "batch": options.batch,
        "resamples": options.resamples,
    }


def _write(
    result: dict[str, Any], sets: Sequence[ImageSet], prompts: Sequence[Prompt],
    scores: dict[str, dict[str, np.ndarray]], out: Path, options: EvaluationOptions,
) -> None:  # fmt: skip
    texts = {
        "report.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "table.csv": table_csv(result),
        "prompts.csv": prompts_csv(prompts, scores, result["rows"]),
        "index.html": write_page(result, sets, prompts, scores, options.shown),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
