"""What the engine asks of a target, and the one place where elements are moved in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from shardstate.buffers import PAGE_BYTES, aligned
from shardstate.coalesce import Piece, Read, Segment
from shardstate.dtypes import DTYPES, cast_array, numpy_dtype
from shardstate.layout import Loop, Region, offsets_of
from shardstate.storage import Arrived, Runs


class Direct(NamedTuple):
    """The memory of a whole read: the destination of each of its pieces, and what lies between."""

    views: Sequence[memoryview]
    arrived: Arrived | None  # who wants to hear how much is there, in the thread that reads


class Target(Protocol):
    """Takes the pieces of a plan. Called from several threads at once, one read a call.

    Reads are begun in the order in which `plan_reads` gave them.
    """

    def direct(self, read: Read) -> Direct | None:
        """Return the memory that `read` may go straight to; None: it has to be staged."""
        return None

    def runs(self, read: Read) -> Sequence[Runs] | None:
        """Return where the bytes of a read go that has no `direct` memory, run by run.

        None where they are not taken as they are, or in runs that are too short to be worth it.
        """
        return None

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        """Take the bytes of `read`, or None where they went to their `direct` memory or `runs`.

        A read of constants comes with `staged` None.
        """
        ...

    def stop(self) -> None:
        """Another thread failed: give up waiting."""
        ...


def runs_of(piece: Piece, address: int) -> Runs | None:
    """Return the runs that a piece puts into the tensor at `address`, if they lie a page apart.

    A run costs as much as a copy of about two KiB, in which staging has gone over what is between.
    """
    if piece.value is not None or piece.source_dtype != piece.dest_dtype:
        return None
    width = DTYPES[piece.source_dtype].itemsize
    found = _rows(piece.move.loops, width)
    if found is None:
        return None
    begins, places, nbytes, together = found
    first = address + piece.move.dest * width
    return Runs(begins + piece.begin, piece.end, places + first, nbytes, together)


@lru_cache(maxsize=256)
def _rows(loops: tuple[Loop, ...], width: int) -> tuple[np.ndarray, np.ndarray, int, bool] | None:
    """Return where runs begin on both sides, bytes from the first, their size, and whether they
    lie end to end in the destination; None where they lie too close in the source.
    """
    inner = loops[-1][0] if loops and loops[-1][1:] == (1, 1) else 1
    outer = loops[:-1] if inner > 1 else loops
    if any(source * width < PAGE_BYTES for _, source, _ in outer):
        return None
    begins = offsets_of(Region(0, tuple((n, source * width) for n, source, _ in outer)))
    places = offsets_of(Region(0, tuple((n, dest * width) for n, _, dest in outer)))
    return begins, places, inner * width, bool((np.diff(places) == inner * width).all())


def moved(piece: Piece, read: Read, staged: np.ndarray | None) -> np.ndarray:
    """Return what `piece` brings, in the order of its destination, as one flat uint8 array.

    A view of the staging memory where that is contiguous already, else a copy.
    """
    memory, offset = _origin(piece, read, staged)
    if piece.source_run and piece.source_dtype == piece.dest_dtype:
        return memory[offset : offset + piece.nbytes]
    values = np.ascontiguousarray(_side(memory, offset, piece, 1))
    return _cast(piece, values).reshape(-1).view(np.uint8)


def spread(piece: Piece, values: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Return a copy of `around`, the bytes from a piece's first to its last, with `values` in."""
    found = around.copy()
    width = DTYPES[piece.dest_dtype].itemsize
    sizes = [loop[0] for loop in piece.move.loops]
    strides = [loop[2] * width for loop in piece.move.loops]
    goal: np.ndarray = np.ndarray(sizes, dtype=f"u{width}", buffer=found.data, strides=strides)
    goal[...] = values.view(goal.dtype).reshape(sizes)
    return found


def transfer(
    piece: Piece, read: Read, staged: np.ndarray | None, memory: np.ndarray, begin: int = 0
) -> None:
    """Put what `piece` brings into the tensor whose bytes from `begin` on are `memory`."""
    origin, offset = _origin(piece, read, staged)
    goal = _side(memory, piece.move.dest * DTYPES[piece.dest_dtype].itemsize - begin, piece, 2)
    values = _side(origin, offset, piece, 1)
    if piece.source_dtype != piece.dest_dtype:
        values = _cast(piece, np.ascontiguousarray(values)).view(goal.dtype)
    goal[...] = values


class Assembly:
    """The segments of one slot while their pieces arrive; together they keep to `room` bytes.

    Whoever brings a piece waits until its segment fits, counted from the earliest one that is not
    released. So only for earlier segments, whose pieces are in hand: reads begin in their order.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._condition = threading.Condition()
        self._memory: dict[int, np.ndarray] = {}  # by where the segment comes (`Segment.at`)
        self._missing: dict[int, int] = {}  # bytes that have not arrived
        self._released: dict[int, int] = {}  # begin → end of what is released out of turn
        self._first = 0  # all before is released
        self._stopped = False

    def put(self, piece: Piece, read: Read, staged: np.ndarray | None) -> np.ndarray | None:
        """Return the bytes of the piece's segment if this was the last one of it, else None."""
        segment = piece.segment
        assert segment is not None, "a piece without a segment is complete by itself"
        with self._condition:
            while (
                self._first < segment.at and segment.at + segment.nbytes > self._first + self._room
            ):
                if self._stopped:
                    return None
                self._condition.wait()
            if segment.at not in self._memory:
                self._memory[segment.at] = aligned(segment.nbytes)
                self._missing[segment.at] = segment.nbytes
            memory = self._memory[segment.at]
        transfer(piece, read, staged, memory, segment.begin)
        with self._condition:
            self._missing[segment.at] -= piece.nbytes
            return None if self._missing[segment.at] else memory

    def release(self, segment: Segment) -> None:
        """Forget a segment that is complete: its bytes are not needed any more."""
        with self._condition:
            del self._memory[segment.at], self._missing[segment.at]
            self._released[segment.at] = segment.at + segment.nbytes
            while self._first in self._released:
                self._first = self._released.pop(self._first)
            self._condition.notify_all()

    def stop(self) -> None:
        """Let every thread that waits here give up."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()


def _origin(piece: Piece, read: Read, staged: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the memory that a piece is served from, and where in it its first element lies."""
    if piece.value is not None:
        width = DTYPES[piece.source_dtype].itemsize
        return np.frombuffer(piece.value, dtype=np.uint8), piece.move.source * width
    assert staged is not None, "a piece that was read directly needs no move"
    return staged, piece.begin - read.begin


def _cast(piece: Piece, values: np.ndarray) -> np.ndarray:
    if piece.source_dtype == piece.dest_dtype:
        return values
    return cast_array(values.view(numpy_dtype(piece.source_dtype)), piece.dest_dtype)


def _side(memory: np.ndarray, offset: int, piece: Piece, side: int) -> np.ndarray:
    """Return the source (1) or destination (2) of a piece's move as a strided view of `memory`."""
    width = DTYPES[piece.source_dtype if side == 1 else piece.dest_dtype].itemsize
    loops = piece.move.loops
    return np.ndarray(
        tuple(loop[0] for loop in loops),
        dtype=f"u{width}",
        buffer=memory.data,
        offset=offset,
        strides=tuple(loop[side] * width for loop in loops),
    )
