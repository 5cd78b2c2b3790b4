"""Notes of launches, while somebody takes them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# A compiled variant, its grid and its arguments; None for a launch that cannot be repeated without Triton's own Python.
Note = tuple[Any, tuple[int, ...], Sequence[Any]] | None


class Place(NamedTuple):
    """Where memory begins: the number of a tensor and the offset there, in bytes; shape and strides of a descriptor."""

    tensor: int
    offset: int
    tile: tuple[list[int], list[int]] | None


_here = threading.local()


@contextmanager
def taking_notes() -> Iterator[list[Note]]:
    """The launches of this thread, in order, as they come."""
    before = getattr(_here, "notes", None)
    notes: list[Note] = []
    _here.notes = notes
    try:
        yield notes
    finally:
        _here.notes = before


def note(variant: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
    """What `launch` has just launched; `variant` None if it was not called directly."""
    notes: list[Note] | None = getattr(_here, "notes", None)
    if notes is not None:
        notes.append(None if variant is None else (variant, grid, args))
