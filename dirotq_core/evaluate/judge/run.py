"""Judging all pairs of a run, a verdict on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...engine.dist import World
from ..images import ImageSet
from ..prompt_sets import Prompt
from ..store import Results
from .protocol import ORDERS, QUESTIONS, VERSION, JudgeError, Verdict, judge_pair

logger = logging.getLogger(__name__)

#: Questions that a process asks before a judge that has refused every one of them counts as failed.
HOPELESS = 40
#: Side of the pictures that a judge is tried with.
TRIAL = 64


@dataclass(frozen=True)
class Task:
    """One question about one pair in one order."""

    prompt: Prompt
    question: str
    order: str

    @property
    def key(self) -> str:
        return f"{self.question}/{self.order}/{self.prompt.id}"


def tasks(prompts: Sequence[Prompt]) -> list[Task]:
    """Of all prompts, questions and orders."""
    return [Task(p, question, order) for p in prompts for question in QUESTIONS for order in ORDERS]


class Docket:
    """The verdicts about one model's pictures against the reference's.

    Args:
        identity: of the judge; another one's verdicts are not used.
    """

    def __init__(self, folder: Path, images: ImageSet, reference: ImageSet, identity: dict[str, Any], rank: int = 0):
        self.images, self.reference = images, reference
        self.results = Results(folder / images.name, "verdicts", rank)
        judge = json.dumps({"protocol": VERSION, **identity}, sort_keys=True).encode()
        self._judge = hashlib.sha256(judge).hexdigest()[:16]

    def stamp(self, task: Task) -> str:
        key = task.prompt.id
        text = hashlib.sha256(task.prompt.text.encode()).hexdigest()[:16]
        return f"{self.images.stamp(key)} {self.reference.stamp(key)} {text} {self._judge}"

    def verdict(self, task: Task) -> str | None:
        """The choice; None if the judge was asked and gave none. ValueError if the pair was not judged."""
        found = self._known(task)
        if found is None:
            raise ValueError(f"{self.results.folder} has no verdict about {task.key!r}; was a picture changed?")
        return found["choice"]

    def missing(self, everything: Sequence[Task]) -> list[Task]:
        """What is to be asked: what was not, and all refused questions where nothing else was answered."""
        known = {t: self._known(t) for t in everything}
        answered = any(v is not None and not v["refused"] for v in known.values())
        return [t for t, verdict in known.items() if verdict is None or (verdict["refused"] and not answered)]

    def _known(self, task: Task) -> dict[str, Any] | None:
        return self.results.get(task.key, self.stamp(task))

    def ask(self, judge: Any, task: Task) -> Verdict:
        pair = self.reference.load(task.prompt.id), self.images.load(task.prompt.id)
        first, second = pair if task.order == ORDERS[0] else pair[::-1]
        return judge_pair(judge, task.question, first, second, task.prompt.text)

    def run(self, judge: Any, everything: Sequence[Task], world: World, parallel: int, progress: bool) -> None:
        """Have every process judge its share of what is missing, `parallel` questions at a time.

        Raises:
            JudgeError: in every process, if the judge failed in one of them or refused whatever it was asked.
        """
        missing = self.missing(everything)
        known = len(missing) < len(everything)
        todo = world.mine(world.share(missing))
        problem: str | None = None
        try:
            self._run(judge, todo, parallel, progress, known)
        except JudgeError as error:
            problem = str(error)
        # Told to all: the others would wait for one that has failed, and it has reports to write.
        problems = world.gather([problem], [[rank] for rank in range(world.size)])
        problem = next(filter(None, problems), None)
        if problem is not None:
            raise JudgeError(problem)

    def _run(self, judge: Any, todo: Sequence[Task], parallel: int, progress: bool, known: bool) -> None:
        unread, refused = 0, 0
        with (
            self.results.writing() as put,
            tqdm(total=len(todo), desc=f"judging {self.images.name}", unit="question", disable=not progress) as bar,
        ):
            for task, verdict in _answers(self, judge, todo, parallel):
                put(task.key, self.stamp(task), vars(verdict))
                unread += verdict.choice is None
                refused += verdict.refused
                known = known or not verdict.refused
                if refused >= HOPELESS and not known:
                    raise JudgeError(f"the judge refused the first {refused} questions; {verdict.reply}")
                bar.set_postfix(unread=unread)
                bar.update()

    def check(self, everything: Sequence[Task]) -> None:
        """JudgeError if all questions were refused."""
        if everything and (left := self.missing(everything)):
            why = (self._known(left[0]) or {}).get("reply", "")
            raise JudgeError(f"the judge refused all {len(everything)} questions about {self.images.name!r}; {why}")


def try_judge(judge: Any) -> None:
    """Ask a question about two tiny pictures, so that hours of drawing do not end at a judge that cannot answer.

    JudgeError if it does not answer; what it says does not matter.
    """
    grey, white = (np.full((TRIAL, TRIAL, 3), level, np.uint8) for level in (128, 255))
    verdict = judge_pair(judge, next(iter(QUESTIONS)), grey, white, "")
    if verdict.refused:
        raise JudgeError(f"a question with two small pictures on trial: {verdict.reply}")
    if verdict.choice is None:
        logger.warning("the judge's reply on trial could not be read: %.200r", verdict.reply)


def _answers(docket: Docket, judge: Any, todo: Sequence[Task], parallel: int) -> Iterator[tuple[Task, Verdict]]:
    """As they come. Threads that still wait for an answer when it ends early are left to themselves."""
    if parallel == 1:
        for task in todo:
            yield task, docket.ask(judge, task)
        return
    waiting: SimpleQueue[Task] = SimpleQueue()
    answered: SimpleQueue[tuple[Task, Verdict | Exception]] = SimpleQueue()
    over = Event()
    for task in todo:
        waiting.put(task)

    def work() -> None:
        while not over.is_set():
            try:
                task = waiting.get_nowait()
            except Empty:
                return
            try:
                answered.put((task, docket.ask(judge, task)))
            except Exception as error:  # raised where the answers are read
                answered.put((task, error))

    for _ in range(min(parallel, len(todo))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in todo:
            task, answer = _next(answered)
            if isinstance(answer, Exception):
                raise answer
            yield task, answer
    finally:
        over.set()


def _next(queue: SimpleQueue[Any]) -> Any:
    """The next item. It wakes up now and then: on Windows an interrupt does not end a wait without limit."""
    while True:
        try:
            return queue.get(timeout=1)
        except Empty:
            continue
