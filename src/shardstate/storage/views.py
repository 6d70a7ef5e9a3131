"""Destinations of one read: memory here and there that the bytes fill one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def total(views: Sequence[memoryview]) -> int:
    return sum(view.nbytes for view in views)


def rest_of(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of `views` after `done` bytes."""
    for i, view in enumerate(views):
        if done < view.nbytes:
            return [view.cast("B")[done:] if done else view, *views[i + 1 :]]
        done -= view.nbytes
    return []


def cut(views: Sequence[memoryview], first: int, most: int) -> Iterator[list[memoryview]]:
    """Yield `views` in lists of `most` bytes each; of `first` bytes the first one."""
    part, room = list[memoryview](), first
    for view in (view.cast("B") for view in views):
        at = 0
        while at < view.nbytes:
            part.append(view[at : at + room])
            at, room = at + part[-1].nbytes, room - part[-1].nbytes
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
