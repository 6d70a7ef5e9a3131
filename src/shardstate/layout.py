"""Regions of linear memory as loops, and moves between two of them: arithmetic without names.

Every number counts elements of one tensor, from its first element. A *region* is an offset and a
list of loops (size, stride); a *move* walks a source region and a destination region in step. A
box of a row-major array is the common case; transposes, interleaved halves and per-head orders are
moves too.

    canonical     loops of size 1 dropped, neighbours merged where both strides allow, sorted by
                  destination stride, largest first
    inverse       inverse(inverse(m)) == m, unless m broadcasts
    compose       (A → B) then (B → C) gives A → C, for what both have in common in B
    intersect     what two regions have in common
    subtract      what a move still writes where a later one wrote too

Intersection, composition and subtraction take both sides as boxes of one mixed radix, which needs
strides that nest like the axes of one array: each divides the next larger one. Where they do not,
loops are unrolled, the shortest first, until they do; `NotNested` where that takes too many parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import numpy as np

from shardstate.errors import NotNested

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # one [begin, end) per axis, in elements
Loop = tuple[int, int, int]  # size, source stride, destination stride

# What does not nest is unrolled into at most so many parts; or so many elements are counted singly.
_PARTS = 4096
_ELEMENTS = 1 << 24
_TOO_MANY = 1 << 63
_PAIRS = 1 << 20  # of interleaved regions compared, before `overlap` gives up


class Region(NamedTuple):
    """One side of a move: elements `offset + Σ i·stride`, `0 <= i < size` for each loop."""

    offset: int
    loops: tuple[tuple[int, int], ...]  # (size, stride)

    @property
    def size(self) -> int:
        """Number of elements; a broadcast element counts each time it is walked."""
        return prod(size for size, _ in self.loops)

    @property
    def end(self) -> int:
        """One past the last element; equals `offset` for an empty region."""
        if not self.size:
            return self.offset
        return self.offset + sum((size - 1) * stride for size, stride in self.loops) + 1


class Move(NamedTuple):
    """Elements of one tensor that go to elements of another, in step."""

    source: int  # offset of the first element read
    dest: int  # offset of the first element written
    loops: tuple[Loop, ...]  # canonical; () is one element

    @property
    def size(self) -> int:
        """Number of elements written."""
        return prod(loop[0] for loop in self.loops)

    @property
    def source_region(self) -> Region:
        return Region(self.source, tuple((n, s) for n, s, _ in self.loops))

    @property
    def dest_region(self) -> Region:
        return Region(self.dest, tuple((n, d) for n, _, d in self.loops))


def element_count(shape: Shape) -> int | None:
    """Return the elements of `shape`; None where its sizes, zeros aside, reach 2**63 together.

    Stops there: the product of a hostile shape's million sizes takes hours.
    """
    total = 1
    for size in shape:
        total *= size or 1
        if total >= _TOO_MANY:
            return None
    return total if all(shape) else 0


def strides_of(shape: Shape) -> tuple[int, ...]:
    """Return the row-major strides of `shape`."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def canonical(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """Return `loops` in the one order and number that the same move always has.

    An empty move keeps a single loop of size 0.
    """
    kept = [loop for loop in loops if loop[0] != 1]
    if any(loop[0] == 0 for loop in kept):
        return ((0, 0, 0),)
    kept.sort(key=lambda loop: (-loop[2], -loop[1]))
    merged: list[Loop] = []
    for size, source, dest in kept:
        if merged:
            outer_size, outer_source, outer_dest = merged[-1]
            if outer_source == size * source and outer_dest == size * dest:
                merged[-1] = (outer_size * size, source, dest)
                continue
        merged.append((size, source, dest))
    return tuple(merged)


@lru_cache(maxsize=4096)
def box_move(source_shape: Shape, box: Box, dest_shape: Shape, at: Shape) -> Move:
    """Return the move of `box` of a row-major source to the place `at` of a row-major destination.

    Both tensors have the axes of `box`; `at` is the destination index of the box's first element.
    """
    source_strides, dest_strides = strides_of(source_shape), strides_of(dest_shape)
    return Move(
        sum(begin * s for (begin, _), s in zip(box, source_strides, strict=True)),
        sum(begin * d for begin, d in zip(at, dest_strides, strict=True)),
        canonical(
            (end - begin, s, d)
            for (begin, end), s, d in zip(box, source_strides, dest_strides, strict=True)
        ),
    )


def inverse(move: Move) -> Move:
    """Return the move that takes the destination back to the source.

    A broadcast is taken at its index 0.
    """
    loops = ((n, d, s) for n, s, d in move.loops if s or not n)
    return Move(move.dest, move.source, canonical(loops))


def compose(first: Move, second: Move) -> list[Move]:
    """Return the moves A → C that `first` (A → B) followed by `second` (B → C) make.

    Elements of B that only one of the two touches are left out. `NotNested` as said above.
    """
    return list(_composed(first, second, _PARTS))


def _composed(first: Move, second: Move, parts: int) -> Iterator[Move]:
    if not _meet(first.dest_region, second.source_region):
        return
    try:
        yield from _compose(first, second)
    except NotNested as error:
        by_first, n = _shortest(first, second, error)
        if n > parts:
            raise
        for part in _unrolled(first if by_first else second, n):
            pair = (part, second) if by_first else (first, part)
            yield from _composed(*pair, parts // n)


def _compose(first: Move, second: Move) -> list[Move]:
    repeats = tuple(loop for loop in second.loops if loop[1] == 0)
    inner = tuple((n, s, d) for n, s, d in second.loops if s)
    units = _units([d for _, _, d in first.loops], [s for _, s, _ in inner])
    ours = _boxes(first.dest, [(n, d, s) for n, s, d in first.loops], first.source, units)
    theirs = _boxes(second.source, inner, second.dest, units)
    moves = []
    for (a_digits, a_offset), (c_digits, c_offset) in product(list(ours), list(theirs)):
        loops: list[Loop] = []
        for (a_begin, a_size, a_stride), (c_begin, c_size, c_stride) in zip(
            a_digits, c_digits, strict=True
        ):
            begin = max(a_begin, c_begin)
            size = min(a_begin + a_size, c_begin + c_size) - begin
            if size <= 0:
                break
            a_offset += (begin - a_begin) * a_stride
            c_offset += (begin - c_begin) * c_stride
            loops.append((size, a_stride, c_stride))
        else:
            moves.append(
                Move(a_offset, c_offset, canonical([*loops, *((n, 0, d) for n, _, d in repeats)]))
            )
    return moves


def intersect(a: Region, b: Region) -> list[Region]:
    """Return the regions that hold exactly the elements of both; `NotNested` as for `compose`."""
    if not a.size or not b.size:
        return []
    identity = (
        Move(r.offset, r.offset, canonical((n, s, s) for n, s in r.loops if s)) for r in (a, b)
    )
    return [move.source_region for move in compose(*identity)]


def subtract(move: Move, region: Region) -> list[Move]:
    """Return the moves that write what `move` writes outside of `region`; `NotNested` as above.

    Regions are in `move`'s destination.
    """
    loops = canonical((n, s, s) for n, s in region.loops if s or not n)
    other = Move(region.offset, region.offset, loops)
    return list(_subtracted(move, other, _PARTS))


def _subtracted(move: Move, other: Move, parts: int) -> Iterator[Move]:
    if not _meet(move.dest_region, other.dest_region):
        yield from [move] if move.size else []
        return
    try:
        yield from _subtract(move, other)
    except NotNested as error:
        by_first, n = _shortest(move, other, error)
        if n > parts:
            raise
        if by_first:
            for part in _unrolled(move, n):
                yield from _subtracted(part, other, parts // n)
            return
        left = [move]
        for part in _unrolled(other, n):
            left = [rest for each in left for rest in _subtracted(each, part, parts // n)]
        yield from left


def _subtract(move: Move, other: Move) -> list[Move]:
    others = [(n, d, 0) for n, _, d in other.loops]
    units = _units([d for _, _, d in move.loops], [d for _, d, _ in others])
    theirs = [digits for digits, _ in _boxes(other.dest, others, 0, units)]
    moves = []
    ours = _boxes(move.dest, [(n, d, s) for n, s, d in move.loops], move.source, units)
    for digits, offset in ours:
        left = [(digits, offset)]
        for taken in theirs:
            left = [piece for each in left for piece in _outside(*each, taken)]
        for piece, source in left:
            dest = sum(begin * unit for (begin, _, _), unit in zip(piece, units, strict=True))
            loops = ((n, s, u) for (_, n, s), u in zip(piece, units, strict=True))
            moves.append(Move(source, dest, canonical(loops)))
    return moves


def _meet(a: Region, b: Region) -> bool:
    """Whether the spans of two regions have an element in common."""
    return bool(a.size and b.size) and a.offset < b.end and b.offset < a.end


def _shortest(first: Move, second: Move, error: NotNested) -> tuple[bool, int]:
    """Return the size of the shortest loop of both, and whether it is one of `first`."""
    sizes = [(n, k) for k, move in enumerate((first, second)) for n, _, _ in move.loops]
    if not sizes:
        raise error
    n, k = min(sizes)
    return k == 0, n


def _unrolled(move: Move, n: int) -> Iterator[Move]:
    """Yield the iterations of the loop of `move` that has size `n`."""
    k = [size for size, _, _ in move.loops].index(n)
    _, source, dest = move.loops[k]
    rest = canonical([*move.loops[:k], *move.loops[k + 1 :]])
    for i in range(n):
        yield Move(move.source + i * source, move.dest + i * dest, rest)


def _outside(digits: _Digits, offset: int, taken: _Digits) -> Iterator[tuple[_Digits, int]]:
    """Yield the parts of a box outside of another one, with the offset on its other side."""
    common = [
        (max(begin, b), min(begin + n, b + m))
        for (begin, n, _), (b, m, _) in zip(digits, taken, strict=True)
    ]
    if any(low >= high for low, high in common):
        yield digits, offset
        return
    rest = list(digits)
    for k, (low, high) in enumerate(common):
        begin, n, stride = rest[k]
        for a, b in ((begin, low), (high, begin + n)):
            if a < b:
                cut = [*rest[:k], (a, b - a, stride), *rest[k + 1 :]]
                yield cut, offset + (a - begin) * stride
        rest[k] = (low, high - low, stride)
        offset += (low - begin) * stride


def union_size(regions: Iterable[Region]) -> int:
    """Return how many different elements `regions` touch; `NotNested` where they do not nest."""
    unique = {region for region in regions if region.size}
    ordered = sorted(unique, key=lambda region: region.offset)
    apart = all(a.end <= b.offset for a, b in pairwise(ordered))
    if apart and not any(_folds(region) for region in ordered):
        return sum(_distinct(region) for region in ordered)
    try:
        return _marked(ordered)
    except NotNested:
        if sum(region.size for region in ordered) > _ELEMENTS:
            raise
        return len(np.unique(np.concatenate([offsets_of(region) for region in ordered])))


def offsets_of(region: Region) -> np.ndarray:
    """Return the offsets of all elements, int64, in the order of the loops."""
    offsets = np.array([region.offset])
    for n, s in region.loops:
        offsets = (offsets[:, None] + np.arange(n) * s).ravel()
    return offsets


def _marked(ordered: Sequence[Region]) -> int:
    loops = [[(n, s, 0) for n, s in region.loops if s and n > 1] for region in ordered]
    units = _units(*([s for _, s, _ in each] for each in loops))
    boxes = [
        [(begin, begin + size) for begin, size, _ in digits]
        for region, each in zip(ordered, loops, strict=True)
        for digits, _ in _boxes(region.offset, each, 0, units)
    ]
    # Boxes of one mixed radix: mark the cells between all their edges, then add up the cells.
    edges = [np.unique([edge for box in boxes for edge in box[k]]) for k in range(len(units))]
    marked = np.zeros([len(e) - 1 for e in edges], dtype=bool)
    for box in boxes:
        marked[
            tuple(slice(*np.searchsorted(e, span)) for e, span in zip(edges, box, strict=True))
        ] = True
    cells = marked.astype(np.int64)
    for axis in reversed(range(cells.ndim)):
        cells = cells @ np.diff(edges[axis])
    return int(cells)


def overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Return the indices of two regions that share an element, or None.

    Both are the same where a region touches an element twice. `NotNested` as for `compose`.
    """
    order = sorted((i for i, r in enumerate(regions) if r.size), key=lambda i: regions[i].offset)
    for i in order:
        if _folds(regions[i]) and union_size([regions[i]]) < regions[i].size:
            return i, i
    open_: list[int] = []
    pairs = 0
    for i in order:
        open_ = [j for j in open_ if regions[j].end > regions[i].offset]
        pairs += len(open_)
        if pairs > _PAIRS:
            raise NotNested(f"{len(regions)} regions lie too entangled to be compared")
        for j in open_:
            if regions[i] == regions[j] or intersect(regions[j], regions[i]):
                return j, i
        open_.append(i)
    return None


def runs(region: Region) -> Iterator[tuple[int, int]]:
    """Yield the fewest contiguous [begin, end) that cover `region`, in the order it is walked."""
    loops = canonical((n, s, s) for n, s in region.loops)
    size = 1
    if loops and loops[-1][2] == 1:
        size = loops[-1][0]
        loops = loops[:-1]
    for index in product(*(range(n) for n, _, _ in loops)):
        begin = region.offset + sum(i * s for i, (_, s, _) in zip(index, loops, strict=True))
        if size and all(n for n, _, _ in loops):
            yield begin, begin + size


def _distinct(region: Region) -> int:
    return prod(n for n, s in region.loops if s)


def _folds(region: Region) -> bool:
    """Whether `region` may touch an element twice: some loop does not step over those inside it."""
    reach = 0
    for size, stride in sorted(region.loops, key=lambda loop: loop[1]):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _units(*strides: Sequence[int]) -> list[int]:
    """Return the place values of the coarsest mixed radix that has all `strides`, largest first."""
    units = sorted({1, *(s for each in strides for s in each)}, reverse=True)
    for outer, inner in pairwise(units):
        if outer % inner:
            raise NotNested(f"strides {outer} and {inner} do not nest: neither divides the other")
    return units


_Digits = list[tuple[int, int, int]]  # per place: begin, size, stride on the other side


def _boxes(
    offset: int, loops: Iterable[Loop], other: int, units: list[int]
) -> Iterator[tuple[_Digits, int]]:
    """Yield `loops` (size, stride here, stride there) as boxes of the mixed radix `units`.

    With each box comes the offset on the other side of its first element. A run that crosses the
    end of a row is cut into head, body and tail.
    """
    place: dict[int, tuple[int, int]] = {}
    for size, stride, there in loops:
        if stride in place:
            raise NotNested(f"two loops share the stride {stride}")
        place[stride] = size, there
    digits: _Digits = []
    for k in range(len(units) - 1, -1, -1):
        unit = units[k]
        size, there = place.get(unit, (1, 0))
        if k == 0:
            digits.append((offset // unit, size, there))
            break
        radix = units[k - 1] // unit
        begin = offset // unit % radix
        if begin + size <= radix:
            digits.append((begin, size, there))
            continue
        if begin == 0 and size % radix == 0:
            if units[k - 1] in place:
                raise NotNested(f"a loop of {size} × {unit} overlaps one of stride {units[k - 1]}")
            digits.append((0, radix, there))
            place[unit] = radix, there
            place[units[k - 1]] = size // radix, there * radix
            continue
        head = radix - begin if begin else 0
        body = (size - head) // radix * radix
        at = 0
        for part in (head, body, size - head - body):
            if part:
                cut = [(n, u, t) for u, (n, t) in place.items() if u != unit]
                cut.append((part, unit, there))
                yield from _boxes(offset + at * unit, cut, other + at * there, units)
            at += part
        return
    digits.reverse()
    yield digits, other
