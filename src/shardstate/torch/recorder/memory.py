"""What is known of the bytes of a storage: which stored tensors its elements come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from shardstate.compose import compose_copy
from shardstate.dtypes import DTYPES
from shardstate.layout import Loop, Move, Region, canonical, strides_of, subtract
from shardstate.plan import Copy, region_in_bytes
from shardstate.torch.recorder.standins import Geometry, RecordingError
from shardstate.torch.tensors import TAGS

# `Copy.source` of an entry is a row of the catalog; or this, for elements that were really written
# and are known no more; or, below it, a value that the recorder keeps (`value_source`).
WRITTEN = -1
_WIDTH_TAGS = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}


def value_source(index: int) -> int:
    """Return the `source` of an entry that takes value `index`; its own inverse."""
    return -2 - index


def unit_of(dtype: torch.dtype) -> str:
    """Return the tag that elements of `dtype` are counted in; `U8` for packed types."""
    tag = TAGS.get(dtype) or _WIDTH_TAGS.get(dtype.itemsize)
    if tag is None:
        raise RecordingError(f"elements of {dtype} have no safetensors type")
    return "U8" if DTYPES[tag].packed else tag


@lru_cache(maxsize=65536)
def _step(
    size: tuple[int, ...],
    source: tuple[int, ...],
    dest: tuple[int, ...],
    source_dtype: torch.dtype,
    dest_dtype: torch.dtype,
) -> tuple[str, str, tuple[Loop, ...]]:
    """Return the units and the loops of a copy between two strided views of one size."""
    return unit_of(source_dtype), unit_of(dest_dtype), loops_between(size, source, dest)


@lru_cache(maxsize=65536)
def loops_between(
    size: tuple[int, ...], source: tuple[int, ...], dest: tuple[int, ...]
) -> tuple[Loop, ...]:
    """Return the loops of a move between two strided views of one size."""
    return canonical(zip(size, source, dest, strict=True))


class Memory:
    """What was written to one storage, in order; the later wins.

    An entry is a `Copy` whose destination counts from the storage's first byte. Those in `past`
    are in a real storage already, those in `log` are not.
    """

    __slots__ = ("_clean", "anchor", "log", "past", "row")

    def __init__(self, *, row: int | None = None, anchor: torch.Tensor | None = None) -> None:
        self.row = row  # of the catalog, for a stored tensor that nothing was written to
        self.anchor = anchor  # keeps a real storage, and so its identity, alive
        self.past: list[Copy] = []
        self.log: list[Copy] = []
        self._clean = 0  # so many entries are known to be apart

    def write(self, entry: Copy) -> None:
        """Note a write; what it covers of earlier ones is dead."""
        self.log.append(entry)

    def own(self, stored: Copy) -> None:
        """Let a stored tensor, all of which `stored` is, become memory that can be written to."""
        if self.row is not None:
            self.row = None
            self.log.append(stored)

    def flushed(self) -> None:
        """Note that all of `log` was carried out."""
        self.past, self.log = self.past + self.log, []

    def resolve(self) -> None:
        """Drop what later writes covered."""
        entries, done = self.past + self.log, len(self.past)
        if self._clean == len(entries):
            return
        if not _apart(entries):
            kept = list(_uncovered(entries))
            entries = [entry for _, entry in kept]
            done = sum(i < done for i, _ in kept)
        self.past = [entry for entry in entries[:done] if entry.source != WRITTEN]
        self.log = [entry for entry in entries[done:] if entry.source != WRITTEN]
        self._clean = len(self.past) + len(self.log)

    def read(self, geometry: Geometry) -> list[Copy] | None:
        """Return the copies that make a view, row-major, in a tensor of its own.

        None where some of its elements are not known. `NotNested` and `PlanError` where the view
        cannot be composed with what was written.
        """
        strides = strides_of(geometry.size)
        if (whole := self._whole(geometry, strides)) is not None:
            return whole
        made = list(self.view(geometry, Geometry(geometry.size, strides, 0, geometry.dtype)))
        known = sum(each.move.size * DTYPES[each.dest_dtype].itemsize for each in made)
        return made if known == geometry.numel * geometry.dtype.itemsize else None

    def _whole(self, geometry: Geometry, strides: tuple[int, ...]) -> list[Copy] | None:
        """Return the entries as they are, where they make just this view; None: compose them."""
        if self.row is not None or geometry.offset or geometry.stride != strides:
            return None
        self.resolve()
        entries, unit = self.past + self.log, unit_of(geometry.dtype)
        numel = geometry.numel * geometry.dtype.itemsize // DTYPES[unit].itemsize
        if (
            any(entry.dest_dtype != unit for entry in entries)
            or sum(entry.move.size for entry in entries) != numel
            or any(entry.move.dest_region.end > numel for entry in entries)
        ):
            return None
        return entries

    def view(self, source: Geometry, goal: Geometry) -> Iterator[Copy]:
        """Yield the copies that take a view of this memory to `goal` in another one."""
        if self.row is not None:
            yield stored_copy(self.row, source, goal)
            return
        then = stored_copy(0, source, goal)
        move = then.move
        self.resolve()
        begin, end = _span(move.source_region, then.source_dtype)
        for entry in (*self.past, *self.log):
            first, last = _span(entry.move.dest_region, entry.dest_dtype)
            if first < end and begin < last:
                yield from compose_copy(entry, then)


def stored_copy(row: int, source: Geometry, goal: Geometry) -> Copy:
    """Return the copy that takes a view of stored tensor `row` to `goal` in another memory."""
    units = _step(source.size, source.stride, goal.stride, source.dtype, goal.dtype)
    return Copy(row, 0, units[0], units[1], Move(source.offset, goal.offset, units[2]))


def _span(region: Region, dtype: str) -> tuple[int, int]:
    width = DTYPES[dtype].itemsize
    return region.offset * width, region.end * width


def _apart(entries: Sequence[Copy]) -> bool:
    """Whether the spans of no two entries meet."""
    spans = sorted(_span(entry.move.dest_region, entry.dest_dtype) for entry in entries)
    return all(a[1] <= b[0] for a, b in pairwise(spans))


def _uncovered(entries: Sequence[Copy]) -> Iterator[tuple[int, Copy]]:
    """Yield what is left of each entry, with its number, where later ones covered it."""
    spans = [_span(entry.move.dest_region, entry.dest_dtype) for entry in entries]
    order = sorted(range(len(entries)), key=lambda i: spans[i][0])
    later: dict[int, list[int]] = {}
    open_: list[int] = []
    for i in order:
        open_ = [j for j in open_ if spans[j][1] > spans[i][0]]
        for j in open_:
            later.setdefault(min(i, j), []).append(max(i, j))
        open_.append(i)
    for i, entry in enumerate(entries):
        left = [entry]
        for j in later.get(i, ()):
            left = [piece for each in left for piece in _without(each, entries[j])]
        yield from ((i, piece) for piece in left)


def _without(entry: Copy, other: Copy) -> Iterator[Copy]:
    """Yield what `entry` writes outside of `other`."""
    move, region = entry.move, other.move.dest_region
    source, dest = entry.source_dtype, entry.dest_dtype
    if entry.dest_dtype != other.dest_dtype:
        region = region_in_bytes(region, DTYPES[other.dest_dtype].itemsize)
        region = _in_units(region, DTYPES[dest].itemsize)
    for rest in subtract(move, region):
        yield Copy(entry.source, entry.dest, source, dest, rest)


def _in_units(region: Region, width: int) -> Region:
    """Return a region in bytes counted in elements of `width` bytes."""
    if width == 1:
        return region
    loops = list(region.loops)
    inner = loops.pop() if loops and loops[-1][1] == 1 else (1, 1)
    numbers = (region.offset, inner[0], *(s for _, s in loops))
    if any(number % width for number in numbers):
        raise RecordingError("a write begins or ends inside an element that was written before")
    scaled = canonical(
        [*((n, s // width, s // width) for n, s in loops), (inner[0] // width, 1, 1)]
    )
    return Region(region.offset // width, tuple((n, s) for n, s, _ in scaled))
