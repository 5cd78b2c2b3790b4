"""The questions, and how a reply is read. A change to either is a change of `VERSION`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

VERSION = 1

FIRST, SECOND, TIE = "first", "second", "tie"
#: In which order the pair is shown. Each pair is judged in both.
ORDERS = ("reference first", "model first")

_HOW = (
    "If you see no difference that matters, it is a tie. Answer with one word and nothing else: FIRST, SECOND or TIE."
)
QUESTIONS = {
    "quality": "Which of the two images has the better perceptual quality? Look for sharp and clean detail, plausible "
    "structure, natural colors, and the absence of noise, blur, distortions and other artifacts. Judge only how well "
    "the images are made, not what they show. " + _HOW,
    "alignment": "Both images were made for this description:\n\n{prompt}\n\nWhich of the two follows it more closely? "
    "Look at the objects and their number, attributes, positions and actions, at text, and at the style it asks for. "
    "Judge only what the images show, not how well they are made. " + _HOW,
}
REMINDER = "That is not one of the three answers. Reply with one word only: FIRST, SECOND or TIE."
#: How often a reply that cannot be read is asked for again.
REMINDERS = 2

#: A part of a message: text, or a picture, uint8 [H, W, 3].
Part = str | np.ndarray


@dataclass(frozen=True)
class Message:
    """role: "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


#: Messages so far → the model's reply.
Ask = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Verdict:
    """choice: FIRST, SECOND, TIE, or None if no reply could be read. reply: the last one, cut. replies: how many."""

    choice: str | None
    reply: str
    replies: int


def read_reply(reply: str) -> str | None:
    """FIRST, SECOND or TIE; None if the reply is none of them.

    What a reasoning model thinks aloud (``<think>…</think>``) is left out. Then one of the words must stand alone, or
    after "Answer:" or the like; a reply with several of them that does not say which is the answer is not guessed at.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", reply, flags=re.DOTALL | re.IGNORECASE)
    marked = re.findall(r"\b(?:answer|verdict)\b\W*(?:is\W+)?(first|second|tie)\b", text, flags=re.IGNORECASE)
    words = marked[-1:] or re.findall(r"\b(?:first|second|tie)\b", text, flags=re.IGNORECASE)
    found = {word.lower() for word in words}
    if len(found) != 1 or (not marked and len(text.split()) > 3):
        return None
    return found.pop()


def judge_pair(ask: Ask, question: str, first: np.ndarray, second: np.ndarray, prompt: str) -> Verdict:
    """Ask one question about two pictures, again if the reply cannot be read."""
    text = QUESTIONS[question].replace("{prompt}", prompt)
    messages = [Message("user", ("First image:", first, "Second image:", second, text))]
    for attempt in range(1, REMINDERS + 2):
        reply = ask(messages)
        choice = read_reply(reply)
        if choice is not None or attempt > REMINDERS:
            return Verdict(choice, reply[:200], attempt)
        messages += [Message("assistant", (reply,)), Message("user", (REMINDER,))]
    raise AssertionError("the last attempt returns")
