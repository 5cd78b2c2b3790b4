"""Judging all pairs of a run, a verdict on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from tqdm.auto import tqdm

from ...engine.dist import World
from ..images import ImageSet
from ..prompt_sets import Prompt
from ..store import Results
from .protocol import ORDERS, QUESTIONS, VERSION, Verdict, judge_pair


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
        """The choice; None if the replies could not be read. KeyError if the pair was not judged."""
        found = self.results.get(task.key, self.stamp(task))
        if found is None:
            raise KeyError(task.key)
        return found["choice"]

    def missing(self, everything: Sequence[Task]) -> list[Task]:
        return [t for t in everything if self.results.get(t.key, self.stamp(t)) is None]

    def ask(self, judge: Any, task: Task) -> Verdict:
        pair = self.reference.load(task.prompt.id), self.images.load(task.prompt.id)
        first, second = pair if task.order == ORDERS[0] else pair[::-1]
        return judge_pair(judge, task.question, first, second, task.prompt.text)

    def run(self, judge: Any, everything: Sequence[Task], world: World, parallel: int, progress: bool) -> None:
        """Have every process judge its share of what is missing, `parallel` questions at a time."""
        todo = world.mine(world.share(self.missing(everything)))
        unread = 0
        with (
            self.results.writing() as put,
            tqdm(total=len(todo), desc=f"judging {self.images.name}", unit="question", disable=not progress) as bar,
        ):
            for task, verdict in _answers(self, judge, todo, parallel):
                put(task.key, self.stamp(task), vars(verdict))
                unread += verdict.choice is None
                bar.set_postfix(unread=unread)
                bar.update()
        world.wait()


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
