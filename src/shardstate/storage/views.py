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


def first_of(views: Sequence[memoryview], most: int) -> list[memoryview]:
    """Return the first `most` bytes of `views`, or all of them."""
    found: list[memoryview] = []
    for view in views:
        part = view.cast("B")[:most]
        if part.nbytes:
            found.append(part)
        most -= part.nbytes
        if not most:
            break
    return found


def parts_of(views: Sequence[memoryview], most: int) -> Iterator[list[memoryview]]:
    """Yield `views` in parts of `most` bytes."""
    part: list[memoryview] = []
    room = most
    for view in views:
        at = 0
        while at < view.nbytes:
            piece = view[at : at + room]
            part.append(piece)
            at += piece.nbytes
            room -= piece.nbytes
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
