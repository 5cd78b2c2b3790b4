"""The questions, and how a reply is read. A change to either is a change of `VERSION`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

VERSION = 2

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
REMINDER_OF_SILENCE = "Reply with one word only: FIRST, SECOND or TIE."
#: How often a reply that cannot be read is asked for again.
REMINDERS = 2

_WORD = re.compile(r"\b(?:first|second|tie)\b", re.IGNORECASE)
#: An announcement whose word ends the sentence or the line: "Answer: FIRST", "**Verdict:** TIE.", "is the second one."
_MARKED = re.compile(
    r"\b(?:answer|verdict)\b\W*(?:is\W+)?(?:(?:the|an?)\W+)?\b(?P<word>first|second|tie)\b"
    r"(?:[ \t]+(?:image|picture|one))?[ \t]*[\"'*_`)\]}]*[ \t]*(?=[.!\n]|\Z)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not?|never|cannot|neither|nor)\b|n['’]t\b", re.IGNORECASE)
#: Words that may stand beside the only answer of a reply.
_FILLERS = frozenset("it s is a an the image picture one".split())

#: A part of a message: text, or a picture, uint8 [H, W, 3].
Part = str | np.ndarray


@dataclass(frozen=True)
class Message:
    """role: "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


class JudgeError(RuntimeError):
    """The judge does not answer: it failed, or refused."""


class QuestionRefused(JudgeError):
    """The judge refused this one question; it may answer others."""


#: Messages so far → the model's reply.
Ask = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Verdict:
    """choice: FIRST, SECOND, TIE, or None without a verdict. reply: the last one, or why it was refused, cut.

    replies: how many there were. refused: whether the question was, before there was any.
    """

    choice: str | None
    reply: str
    replies: int
    refused: bool = False


def read_reply(reply: str) -> str | None:
    """FIRST, SECOND or TIE; None if the reply is none of them, or leaves open which.

    The word must be all there is but for an article or the like, or it must end the sentence or line that announces an
    answer, with no other of the three words after it and no "not" before it. Of several announcements the last counts.
    """
    text = _without_thoughts(reply)
    marked = list(_MARKED.finditer(text))
    if not marked:
        return _alone(text)
    last = marked[-1]
    word = last["word"].lower()
    later = {w.lower() for w in _WORD.findall(text, last.end())}
    clause = re.split(r"[.,;:!?\n]", text[: last.start()])[-1]
    return None if later - {word} or _NEGATION.search(clause) else word


def _without_thoughts(reply: str) -> str:
    """Without what a reasoning model thinks aloud; some templates open ``<think>`` in the question, out of sight."""
    text = re.split(r"</think>", reply, flags=re.IGNORECASE)[-1]
    text = re.split(r"<think>", text, flags=re.IGNORECASE)[0]
    return re.sub(r"</(?:answer|verdict)>", "\n", re.sub(r"\\(?:boxed|text)\b", "", text), flags=re.IGNORECASE)


def _alone(text: str) -> str | None:
    words = [w.lower() for w in re.findall(r"\w+", text)]
    found = [w for w in words if w in (FIRST, SECOND, TIE)]
    return found[0] if len(found) == 1 and _FILLERS >= set(words) - set(found) and "?" not in text else None


def judge_pair(ask: Ask, question: str, first: np.ndarray, second: np.ndarray, prompt: str) -> Verdict:
    """Ask one question about two pictures, again if the reply cannot be read. JudgeError if there is no reply."""
    text = QUESTIONS[question].replace("{prompt}", prompt)
    messages = [Message("user", ("First image:", first, "Second image:", second, text))]
    for attempt in range(1, REMINDERS + 2):
        try:
            reply = ask(messages)
        except QuestionRefused as error:
            return Verdict(None, str(error)[:200], attempt - 1, refused=attempt == 1)
        choice = read_reply(reply)
        if choice is not None or attempt > REMINDERS:
            return Verdict(choice, reply[:200], attempt)
        if reply.strip():
            messages += [Message("assistant", (reply,)), Message("user", (REMINDER,))]
        else:  # some servers refuse a conversation with an empty turn
            messages[-1] = Message("user", (*messages[-1].parts, REMINDER_OF_SILENCE))
    raise AssertionError("the last attempt returns")
