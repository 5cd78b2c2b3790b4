"""What the verdicts say: preferences with intervals, and how far the judge agrees with itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bootstrap import Interval, intervals
from .protocol import FIRST, ORDERS, TIE

#: (in the order "reference first", in the order "model first") → the choice, None if unread.
Pair = tuple[str | None, str | None]


@dataclass(frozen=True)
class Tally:
    """Of one model and one question, over the prompts where both replies could be read.

    Attributes:
        preference: mean over prompts and both orders of +1 for the model, −1 for the reference, 0 for a tie.
        won, lost: shares of prompts where it is so in both orders. tied: the other ones.
        agreement: share of prompts judged alike in both orders.
        first: share of FIRST among verdicts that are no tie, 0.5 for a judge without a habit; None if all are ties.
        judged: how many prompts; without any, the others are None. unread: questions without a verdict, of all.
    """

    preference: Interval | None
    won: float | None
    tied: float | None
    lost: float | None
    agreement: float | None
    first: float | None
    judged: int
    unread: int


def preferences(pairs: Sequence[Pair]) -> np.ndarray:
    """[P, 2] of −1, 0, 1, how far the model is preferred in either order; NaN where a reply was not read."""
    return np.array([[_signed(choice, order) for choice, order in zip(p, ORDERS, strict=True)] for p in pairs])


def _signed(choice: str | None, order: str) -> float:
    if choice is None:
        return np.nan
    if choice == TIE:
        return 0.0
    return 1.0 if (choice == FIRST) == (order == ORDERS[1]) else -1.0


def tally(pairs: Sequence[Pair], resamples: int) -> Tally:
    """Count the verdicts about `pairs`, one for each prompt."""
    signed = preferences(pairs)
    read = signed[~np.isnan(signed).any(axis=1)]
    unread = int(np.isnan(signed).sum())
    if not len(read):
        return Tally(None, None, None, None, None, None, 0, unread)
    mean = read.mean(axis=1)
    same = read[:, 0] == read[:, 1]
    won, lost = ((read == sign).all(axis=1) for sign in (1.0, -1.0))
    choices = [c for p in pairs for c in p if c not in (None, TIE)]
    return Tally(
        preference=intervals(mean[:, None], resamples)[0],
        won=float(np.mean(won)),
        tied=float(np.mean(~(won | lost))),
        lost=float(np.mean(lost)),
        agreement=float(np.mean(same)),
        first=choices.count(FIRST) / len(choices) if choices else None,
        judged=len(read),
        unread=unread,
    )


def against_control(pairs: Sequence[Pair], control: Sequence[Pair], resamples: int) -> Interval | None:
    """The model's preference less the control's, paired by prompt; None if no prompt was judged for both."""
    both = np.stack([preferences(p).mean(axis=1) for p in (pairs, control)], axis=1)
    both = both[~np.isnan(both).any(axis=1)]
    return intervals((both[:, 0] - both[:, 1])[:, None], resamples)[0] if len(both) else None
