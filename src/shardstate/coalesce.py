"""Copies → pieces → reads: what to ask of the storage, and what to do with each answer.

A *piece* is a part of one copy, small enough to stage. A *read* is one request, and the pieces that
are served from it. Everything is planned before the first byte moves.

Copies are cut along their outermost source loop, at the same places for all ranks, so that in one
pass over several ranks each source byte is read once. Contiguous pieces end where the digest blocks
of their destination end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardstate.digest import BLOCK_BYTES
from shardstate.dtypes import DTYPES
from shardstate.layout import Move, canonical
from shardstate.plan import Copy, Fill, Literal, Plan

# Gaps that are read over may cost this much of what contiguous copies want, in all.
OVERREAD = 0.04


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a copy, or a constant: elements for one tensor of one plan."""

    slot: int  # which plan
    dest: int  # row of that plan's tensors
    move: Move  # elements of `source_dtype` → elements of `dest_dtype`, from each tensor's start
    source_dtype: str
    dest_dtype: str
    source: int  # row of that plan's catalog; -1 for a constant
    base: int  # where the source tensor begins: bytes from the start of the file
    value: bytes | None = None  # a constant: what stands in for the file

    @property
    def begin(self) -> int:
        """First byte of the file that the piece needs."""
        return self.base + self.move.source * DTYPES[self.source_dtype].itemsize

    @property
    def end(self) -> int:
        """One past the last byte of the file that the piece needs."""
        return self.base + self.move.source_region.end * DTYPES[self.source_dtype].itemsize

    @property
    def source_run(self) -> bool:
        """Whether what it needs is contiguous in the file."""
        loops = self.move.loops
        return not loops or (len(loops) == 1 and loops[0][1] == 1)

    @property
    def dest_run(self) -> tuple[int, int] | None:
        """The [begin, end) bytes of the tensor that it fills, if they are contiguous."""
        loops = sorted(((d, n) for n, _, d in self.move.loops), reverse=True)
        size = 1
        for stride, n in reversed(loops):
            if stride != size:
                return None
            size *= n
        width = DTYPES[self.dest_dtype].itemsize
        return self.move.dest * width, (self.move.dest + size) * width

    @property
    def nbytes(self) -> int:
        """Bytes that it fills."""
        return self.move.size * DTYPES[self.dest_dtype].itemsize


@dataclass(frozen=True, slots=True)
class Read:
    """One request: bytes `[begin, end)` of `file`, and the pieces that are served from them."""

    file: str | None  # None: the pieces are constants, and nothing is read
    begin: int  # bytes from the start of the file, header included
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def plan_reads(
    plans: Sequence[Plan],
    *,
    in_dest_order: bool,
    piece_bytes: int,
    read_bytes: int,
    max_gap_bytes: int,
    wanted: Sequence[frozenset[int]] | None = None,
) -> list[Read]:
    """Return the reads that carry out `plans`, whose catalogs lie in one storage.

    `in_dest_order`: by destination tensor, all plans in step, so that each output is one sequential
    stream; otherwise by file and offset. `wanted` limits each plan to some rows of its tensors.
    A read has at most `read_bytes`, unless its pieces overlap in the file. Gaps of up to
    `max_gap_bytes` are read over, the smallest first, as far as `OVERREAD` allows.
    """
    names = sorted({name for plan in plans for name in plan.catalog.files})
    number_of = {name: i for i, name in enumerate(names)}
    keyed: list[tuple[tuple[int, ...], Piece]] = []
    for slot, plan in enumerate(plans):
        file_number = [*(number_of[name] for name in plan.catalog.files), -1]
        rows = None if wanted is None else wanted[slot]
        by_dest: dict[int, list[tuple[int, Copy | Fill | Literal]]] = defaultdict(list)
        for copy in plan:
            begin = copy.move.dest * DTYPES[copy.dest_dtype].itemsize
            by_dest[copy.dest].append((begin, copy))
        for fill in plan.fills:
            by_dest[fill.dest].append((fill.region.offset * DTYPES[fill.dtype].itemsize, fill))
        for literal in plan.literals:
            by_dest[literal.dest].append((literal.begin, literal))
        for dest in sorted(by_dest):
            if rows is not None and dest not in rows:
                continue
            each = sorted(by_dest[dest], key=lambda pair: pair[0])
            for number, (_, part) in enumerate(each):
                for piece, file in _pieces(part, plan, slot, piece_bytes, max_gap_bytes):
                    place = (file_number[file], piece.begin, slot, piece.move.dest)
                    key = (dest, number, *place) if in_dest_order else (*place, dest)
                    keyed.append((key, piece))
    keyed.sort(key=lambda pair: pair[0])
    files = [key[2] if in_dest_order else key[0] for key, _ in keyed]
    pieces = [piece for _, piece in keyed]
    spans = [(piece.begin, piece.end) for piece in pieces]
    bridged = _bridged_gaps(pieces, spans, files, max_gap_bytes)
    reads: list[Read] = []
    start, begin, end = 0, 0, 0
    for i, (a, b) in enumerate(spans):
        if i > start and (
            files[i] != files[start]
            or files[i] < 0
            or a < begin
            or (a > end and i not in bridged)
            or (a >= end and max(b, end) - begin > read_bytes)
        ):
            reads.append(_read(names, files[start], begin, end, pieces[start:i]))
            start = i
        if i == start:
            begin, end = a, b
        end = max(end, b)
    if spans:
        reads.append(_read(names, files[start], begin, end, pieces[start:]))
    return reads


def _read(names: Sequence[str], file: int, begin: int, end: int, pieces: list[Piece]) -> Read:
    if file < 0:
        return Read(None, 0, 0, tuple(pieces))
    return Read(names[file], begin, end, tuple(pieces))


def _bridged_gaps(
    pieces: Sequence[Piece],
    spans: Sequence[tuple[int, int]],
    files: Sequence[int],
    max_gap_bytes: int,
) -> set[int]:
    """Return the numbers of the pieces that are read together with the gap before them."""
    gaps: list[tuple[int, int]] = []
    end = 0
    wanted = 0  # bytes of the files: what several ranks read counts once, and casts do not count
    for i, (a, b) in enumerate(spans):
        if files[i] < 0:
            continue
        if not i or files[i] != files[i - 1] or a < spans[i - 1][0]:
            end = a
        elif 0 < a - end <= max_gap_bytes:
            gaps.append((a - end, i))
        if pieces[i].source_run:
            wanted += max(0, b - max(a, end))
        end = max(end, b)
    budget = OVERREAD * wanted
    bridged = set()
    for gap, i in sorted(gaps):
        budget -= gap
        if budget < 0:
            break
        bridged.add(i)
    return bridged


def _pieces(
    part: Copy | Fill | Literal, plan: Plan, slot: int, limit: int, max_gap_bytes: int
) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces of one entry of a plan, each with the number of its file (-1: constant)."""
    match part:
        case Copy(source, dest, source_dtype, dest_dtype, move):
            base, file, value = (
                int(plan.catalog.begin[source]),
                int(plan.catalog.file[source]),
                None,
            )
        case Fill(dest, source_dtype, region, value):
            dest_dtype, source, base, file = source_dtype, -1, 0, -1
            move = Move(0, region.offset, canonical((n, 0, s) for n, s in region.loops))
        case Literal(dest, begin, value):
            source_dtype = dest_dtype = "U8"
            source, base, file = -1, 0, -1
            move = Move(0, begin, canonical([(len(value), 1, 1)]))
    widths = DTYPES[source_dtype].itemsize, DTYPES[dest_dtype].itemsize
    for cut in _cut(move, widths, limit, max_gap_bytes):
        yield Piece(slot, dest, cut, source_dtype, dest_dtype, source, base, value), file


def _cut(move: Move, widths: tuple[int, int], limit: int, max_gap_bytes: int) -> Iterator[Move]:
    """Yield `move` in pieces that span at most `limit` bytes on either side, in source order."""
    if not move.loops:
        yield move
        return
    # Along the source; where that stands still (a constant), along the destination.
    (size, source, dest), *others = sorted(move.loops, key=lambda loop: -(loop[1] or loop[2]))
    rest = canonical(others)
    inner = Move(move.source, move.dest, rest)
    extent = inner.source_region.end - inner.source
    whole = max((move.source_region.end - move.source) * widths[0], move.size * widths[1])
    # Iterations that lie further apart than the largest gap are requests of their own.
    apart = source and (source - extent) * widths[0] > max_gap_bytes
    if whole <= limit and not apart:
        yield move
        return
    each = max((source or extent) * widths[0], inner.size * widths[1])
    if apart or each > limit:
        for i in range(size):
            yield from _cut(
                Move(move.source + i * source, move.dest + i * dest, rest),
                widths,
                limit,
                max_gap_bytes,
            )
        return
    count = limit // each
    at = 0
    # The first piece of a run ends at a block of its destination, and so do all others.
    if not rest and dest == 1 and limit % BLOCK_BYTES == 0 and BLOCK_BYTES % widths[1] == 0:
        count -= count * widths[1] % BLOCK_BYTES // widths[1]
        head = -move.dest % (BLOCK_BYTES // widths[1])
        if head and count:
            yield Move(move.source, move.dest, canonical([(min(head, size), source, dest)]))
            at = head
        count = count or limit // each
    loops = canonical([(count, source, dest), *rest])
    while at < size:
        step = min(count, size - at)
        if step < count:
            loops = canonical([(step, source, dest), *rest])
        yield Move(move.source + at * source, move.dest + at * dest, loops)
        at += step
