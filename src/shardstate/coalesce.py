"""Copies → pieces → reads: what to ask of the storage, and what to do with each answer.

A *piece* is a part of one copy, small enough to stage. A *read* is one request, and the pieces that
are served from it. Everything is planned before the first byte moves.

Copies are cut along their outermost source loop, at the same places for all ranks, so that in one
pass over several ranks each source byte is read once. Contiguous pieces end where the digest blocks
of their destination end, and, where a grid is given, at its lines in the file.

A rank file is one stream, so its pieces come in the order of their destination. Copies that keep
the order of their source have it from the start. Transposes, and copies that interleave, do not:
their destination is cut into windows, and what only several pieces together make of a window is a
*segment*, to be assembled in memory. All pieces of a segment come before those of the next, so that
whoever waits for earlier bytes waits for a read that began before his own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from math import prod
from operator import itemgetter
from typing import NamedTuple

from shardstate.digest import BLOCK_BYTES
from shardstate.dtypes import DTYPES
from shardstate.garbage import without_collection
from shardstate.layout import Loop, Move, canonical
from shardstate.plan import Plan

# Gaps that are read over may cost this much of what contiguous copies want, in all.
OVERREAD = 0.04

# Memory for all segments that are being assembled. Each slot has an equal share of it.
ASSEMBLY_BYTES = 64 << 20

_FEW = 64  # pieces of one copy


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `[begin, end)` of a tensor that several pieces make together."""

    begin: int  # bytes from the tensor's first byte
    end: int
    at: int  # bytes of all segments of the slot that come before

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Piece(NamedTuple):
    """A part of a copy, or a constant: elements for one tensor of one plan."""

    slot: int  # which plan
    dest: int  # row of that plan's tensors
    move: Move  # elements of `source_dtype` → elements of `dest_dtype`, from each tensor's start
    source_dtype: str
    dest_dtype: str
    source: int  # row of that plan's catalog; -1 for a constant
    base: int  # where the source tensor begins: bytes from the start of the file
    value: bytes | None = None  # a constant: what stands in for the file
    segment: Segment | None = None  # where it is assembled; in destination order only

    @property
    def begin(self) -> int:
        """First byte of the file that the piece needs."""
        return self.base + self.move.source * DTYPES[self.source_dtype].itemsize

    @property
    def end(self) -> int:
        """One past the last byte of the file that the piece needs."""
        end = self.move.source + _reach(self.move.loops) + 1
        return self.base + end * DTYPES[self.source_dtype].itemsize

    @property
    def source_run(self) -> bool:
        """Whether what it needs is contiguous in the file."""
        loops = self.move.loops
        return not loops or (len(loops) == 1 and loops[0][1] == 1)

    @property
    def source_full(self) -> bool:
        """Whether it needs all bytes from its first to its last, in whatever order."""
        if self.source_run:
            return True
        width = DTYPES[self.source_dtype].itemsize
        elements = prod(n for n, source, _ in self.move.loops if source)
        return self.end - self.begin == elements * width

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
    def direct_run(self) -> tuple[int, int] | None:
        """The [begin, end) bytes of the tensor that it can be read straight into, if there are."""
        size = 1  # asked of every piece: so not by `source_run` and `dest_run`, which take longer
        if self.move.loops:
            (size, source, dest), *inner = self.move.loops
            if inner or source != 1 or dest != 1:
                return None
        if self.value is not None or self.source_dtype != self.dest_dtype:
            return None
        width = DTYPES[self.dest_dtype].itemsize
        return self.move.dest * width, (self.move.dest + size) * width

    @property
    def dest_span(self) -> tuple[int, int]:
        """The bytes of the tensor from the first to the last that it fills, as [begin, end)."""
        width = DTYPES[self.dest_dtype].itemsize
        reach = sum([(n - 1) * d for n, _, d in self.move.loops])
        return self.move.dest * width, (self.move.dest + reach + 1) * width

    @property
    def nbytes(self) -> int:
        """Bytes that it fills."""
        return self.move.size * DTYPES[self.dest_dtype].itemsize


class Read(NamedTuple):
    """One request: bytes `[begin, end)` of `file`, and the pieces that are served from them."""

    file: str | None  # None: the pieces are constants, and nothing is read
    begin: int  # bytes from the start of the file, header included
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@lru_cache(maxsize=4096)
def _reach(loops: tuple[Loop, ...]) -> int:
    """Return the elements of the source from the first to the last that loops read."""
    return sum((n - 1) * source for n, source, _ in loops)


_Part = tuple[Piece, int]  # an entry of a plan, whole or cut, and the number of its file


@dataclass(frozen=True, slots=True)
class _Limits:
    """What pieces keep to, in bytes."""

    piece: int  # either side of a piece
    gap: int  # between iterations that are read together
    room: int  # all segments that a slot assembles at a time


@without_collection()
def plan_reads(
    plans: Sequence[Plan],
    *,
    in_dest_order: bool,
    piece_bytes: int,
    read_bytes: int,
    max_gap_bytes: int,
    direct_bytes: int = 0,
    grid_bytes: int = 0,
    workers: int = 1,
    wanted: Sequence[frozenset[int]] | None = None,
    assembly_bytes: int = ASSEMBLY_BYTES,
) -> list[Read]:
    """Return the reads that carry out `plans`, whose catalogs lie in one storage.

    `in_dest_order`: by destination tensor, all plans in step, so that each output is one sequential
    stream; otherwise by file and offset. `wanted` limits each plan to some rows of its tensors.
    A read has at most `read_bytes`, and two pieces more where those overlap in the file; up to
    `direct_bytes`, if that is more, where all of it can go straight into its destination and no gap
    lies between, but never more than one of so many `workers` has left to read, so that none is
    left alone with a long one. With `grid_bytes` such reads end at its multiples in their file
    instead. Gaps of up to `max_gap_bytes` are read over, the smallest first, as far as `OVERREAD`
    allows. A segment has at most an equal share of `assembly_bytes` for each plan: where that is
    less than a transpose needs, the same bytes are read again for each segment.
    """
    names = sorted({name for plan in plans for name in plan.catalog.files})
    number_of = {name: i for i, name in enumerate(names)}
    limits = _Limits(piece_bytes, max_gap_bytes, assembly_bytes // max(1, len(plans)))
    keyed: list[tuple[tuple[int, ...], Piece]] = []
    for slot, plan in enumerate(plans):
        rows = None if wanted is None else wanted[slot]
        parts = _parts(plan, slot, [number_of[name] for name in plan.catalog.files])
        if rows is not None:
            parts = (part for part in parts if part[0].dest in rows)
        if in_dest_order:
            keyed.extend(_in_dest_order(parts, limits))
            continue
        for whole, file in parts:
            made = _pieces(whole, limits)
            for piece in _on_grid(made, grid_bytes) if grid_bytes else made:
                keyed.append(((file, piece.begin, slot, piece.move.dest, piece.dest), piece))
    keyed.sort(key=lambda pair: pair[0])
    place = 3 if in_dest_order else 0  # where keys hold the file and the first byte
    files = [key[place] for key, _ in keyed]
    pieces = [piece for _, piece in keyed]
    spans = [(key[place + 1], piece.end) for key, piece in keyed]
    bridged = _bridged_gaps(pieces, spans, files, max_gap_bytes)
    reads: list[Read] = []
    most = read_bytes + 2 * piece_bytes
    longer = direct_bytes > read_bytes
    left = sum(b - a for a, b in spans) if longer else 0
    start, begin, end, longest = 0, 0, 0, 0
    direct = False  # whether all of the read so far can go straight to its place, without a gap
    for i, (a, b) in enumerate(spans):
        also = longer and pieces[i].direct_run is not None
        long = direct and also and a == end
        if i > start and (
            files[i] != files[start]
            or files[i] < 0
            or a < begin
            or (a > end and i not in bridged)
            or max(b, end) - begin > (longest if long else read_bytes if a >= end else most)
            or (long and grid_bytes and a // grid_bytes != begin // grid_bytes)
        ):
            reads.append(_read(names, files[start], begin, end, pieces[start:i]))
            start = i
        if i == start:
            begin, end, direct = a, a, also
            share = left // workers
            longest = direct_bytes if grid_bytes else min(max(share, read_bytes), direct_bytes)
        direct = direct and also and a == end
        end = max(end, b)
        left -= b - a
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
    new: list[int] = []  # bytes of each span that are in none before
    end = before = 0
    for i, (a, b) in enumerate(spans):
        if not i or files[i] != files[i - 1] or a < before:
            end = a
        elif files[i] >= 0 and 0 < a - end <= max_gap_bytes:
            gaps.append((a - end, i))
        before = a
        new.append(b - a if a >= end else max(0, b - end))
        end = max(end, b)
    if not gaps:
        return set()
    # Bytes of the files: what several ranks read counts once, and casts do not count.
    budget = OVERREAD * sum(
        nbytes
        for nbytes, file, piece in zip(new, files, pieces, strict=True)
        if nbytes and file >= 0 and piece.source_full
    )
    bridged = set()
    for gap, i in sorted(gaps):
        budget -= gap
        if budget < 0:
            break
        bridged.add(i)
    return bridged


def _parts(plan: Plan, slot: int, file_number: Sequence[int]) -> Iterator[_Part]:
    """Yield the entries of a plan, whole. The number of a constant's file is -1."""
    files, begins = plan.catalog.file.tolist(), plan.catalog.begin.tolist()
    for copy in plan:
        row, tags = copy.source, (copy.source_dtype, copy.dest_dtype)
        yield Piece(slot, copy.dest, copy.move, *tags, row, begins[row]), file_number[files[row]]
    for fill in plan.fills:
        move = Move(0, fill.region.offset, canonical((n, 0, s) for n, s in fill.region.loops))
        yield Piece(slot, fill.dest, move, fill.dtype, fill.dtype, -1, 0, fill.value), -1
    for literal in plan.literals:
        move = Move(0, literal.begin, canonical([(len(literal.data), 1, 1)]))
        yield Piece(slot, literal.dest, move, "U8", "U8", -1, 0, literal.data), -1


def _in_dest_order(
    parts: Iterable[_Part], limits: _Limits
) -> Iterator[tuple[tuple[int, ...], Piece]]:
    """Yield the pieces of one plan, each with what sorts them: for every tensor one stream."""
    by_dest: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        by_dest[part[0].dest].append(part)
    assembled = 0
    for dest in sorted(by_dest):
        for number, cluster in enumerate(_clusters(by_dest[dest], limits.room)):
            for group, together in _groups(cluster, limits):
                segment = None
                if together:
                    segment = Segment(group.begin, group.end, assembled)
                    assembled += segment.nbytes
                # Within a group by place in the file: there the ranks are in step.
                place = dest, number, group.begin - cluster.begin
                for piece, file in group.parts:
                    if segment is not None:
                        piece = _part_of(piece, piece.move, segment)
                    yield (*place, file, piece.begin, piece.slot, piece.move.dest), piece


class _Cluster(NamedTuple):
    """Parts of one destination tensor that belong together, from its byte `begin` to `end`."""

    begin: int
    end: int
    parts: list[_Part]
    sharing: bool  # whether some belong here only because they read the same bytes


def _clusters(parts: Sequence[_Part], room: int) -> Iterator[_Cluster]:
    """Yield `parts` of one tensor in its order; those together whose destinations interleave.

    Those together as well that read the same bytes, as far as they fit into `room`: assembled
    together, they need these bytes once.
    """
    if len(parts) == 1:  # nearly all tensors of nearly all models
        yield _Cluster(*parts[0][0].dest_span, [parts[0]], False)
        return
    found: list[_Part] = []
    first = last = 0
    sharing = False
    latest: dict[int, Piece] = {}  # the last part of the cluster that reads this source
    spans = [(*part[0].dest_span, part) for part in parts]
    spans.sort(key=itemgetter(0))
    for begin, end, part in spans:
        piece = part[0]
        if found and begin >= last:
            other = latest.get(piece.source)
            if (
                other is not None
                and max(other.begin, piece.begin) < min(other.end, piece.end)
                and end - first <= room
            ):
                sharing = True
            else:
                yield _Cluster(first, last, found, sharing)
                found, sharing, latest = [], False, {}
        if not found:
            first, last = begin, end
        if piece.value is None:
            latest[piece.source] = piece
        last = max(last, end)
        found.append(part)
    if found:
        yield _Cluster(first, last, found, sharing)


def _groups(cluster: _Cluster, limits: _Limits) -> Iterator[tuple[_Cluster, bool]]:
    """Yield the pieces of a cluster in groups, and whether a group is assembled in a segment.

    In the order of the destination: a group ends before the next one begins.
    """
    begin, end, parts, sharing = cluster
    one_stream = len(parts) == 1 and _keeps_order(parts[0][0])
    whole = sharing and end - begin <= limits.room
    step = end - begin if one_stream or whole else _window(cluster, limits)
    if step < end - begin:
        unit = _unit(cluster)
        windows: dict[int, list[_Part]] = defaultdict(list)
        for piece, file in parts:
            width = DTYPES[piece.dest_dtype].itemsize
            for number, move in _windows(piece.move, begin // unit * unit // width, step // width):
                windows[number].append((_part_of(piece, move), file))
        for number in sorted(windows):
            for inner in _clusters(windows[number], limits.room):
                yield from _groups(inner, limits)
        return
    pieces = [(piece, file) for each, file in parts for piece in _pieces(each, limits)]
    if one_stream or whole:
        yield _Cluster(begin, end, pieces, sharing), whole
        return
    for group in _clusters(pieces, 0):
        yield group, len(group.parts) > 1


@lru_cache(maxsize=4096)
def _runs_forward(loops: tuple[Loop, ...], constant: bool) -> bool:
    """Whether loops fill one run of the destination while the source only goes forward."""
    size = reach = 1
    for n, source, dest in reversed(loops):
        if dest != size or (source < reach and not constant):
            return False
        size *= n
        reach += (n - 1) * source
    return True


def _keeps_order(piece: Piece) -> bool:
    """Whether what `_cut` makes of it are runs of the destination, one after the other."""
    return _runs_forward(piece.move.loops, piece.value is not None)


def _unit(cluster: _Cluster) -> int:
    """Return the widest element of a cluster, bytes: it is cut only at multiples of that."""
    return max(DTYPES[piece.dest_dtype].itemsize for piece, _ in cluster.parts)


def _window(cluster: _Cluster, limits: _Limits) -> int:
    """Return the bytes of destination after which a cluster is cut; its own size: not at all."""
    size = cluster.end - cluster.begin
    unit = _unit(cluster)
    outer = [(piece, piece.move.loops[0]) for piece, _ in cluster.parts if piece.move.loops]
    step = max(loop[2] * DTYPES[piece.dest_dtype].itemsize for piece, loop in outer)
    step = -(-step // unit) * unit
    if any(_turns(piece) for piece, _ in outer):
        # A cut along the destination leaves pieces that read the same bytes of the source, or
        # nearly so. All that fits is assembled from one pass over it; else there is one pass for
        # each window, and so it is as large as can be.
        if size <= limits.room:
            return size
        return max(1, limits.room // step) * step
    limit = min(limits.piece, limits.room)
    if size <= limit and all(piece.end - piece.begin <= limits.piece for piece, _ in cluster.parts):
        return size
    count = limit // step
    for piece, (_, source, dest) in outer:
        widths = DTYPES[piece.source_dtype].itemsize, DTYPES[piece.dest_dtype].itemsize
        if source:
            count = min(count, limits.piece * dest * widths[1] // (source * widths[0] * step))
    return max(1, count) * step


def _turns(piece: Piece) -> bool:
    """Whether the outermost loop of the destination steps over less than it needs of the source."""
    (_, source, _), *inner = piece.move.loops
    return piece.value is None and source <= sum((n - 1) * s for n, s, _ in inner)


def _windows(move: Move, begin: int, size: int) -> Iterator[tuple[int, Move]]:
    """Yield what `move` brings into each window of the destination, and the window's number.

    Window i holds the elements from `begin + i * size` on, up to the next one.
    """
    number = (move.dest - begin) // size
    if not move.loops:
        yield number, move
        return
    (n, source, dest), *inner = move.loops
    extent = 1 + sum((m - 1) * d for m, _, d in inner)
    at = 0
    while at < n:
        here = move.dest + at * dest
        number = (here - begin) // size
        # Iterations that end before the window does; none: the next one lies in two windows.
        room = begin + (number + 1) * size - here - extent
        count = min(n - at, room // dest + 1)
        if count > 0:
            loops = canonical([(count, source, dest), *inner])
            yield number, Move(move.source + at * source, here, loops)
        else:
            yield from _windows(Move(move.source + at * source, here, tuple(inner)), begin, size)
        at += max(1, count)


def _part_of(piece: Piece, move: Move, segment: Segment | None = None) -> Piece:
    """Return what `move` says of a piece's elements, without the rest of them."""
    return Piece(
        piece.slot,
        piece.dest,
        move,
        piece.source_dtype,
        piece.dest_dtype,
        piece.source,
        piece.base,
        piece.value,
        segment,
    )


def _pieces(whole: Piece, limits: _Limits) -> Iterator[Piece]:
    """Yield `whole` in pieces that keep to the limits."""
    widths = DTYPES[whole.source_dtype].itemsize, DTYPES[whole.dest_dtype].itemsize
    loops = whole.move.loops
    if not loops or (
        len(loops) == 1 and loops[0][1] == 1 and loops[0][0] * max(widths) <= limits.piece
    ):
        yield whole  # most of them
        return
    move = whole.move
    # Where it begins in a block of its destination is all that counts of its place.
    begin = move.dest % (BLOCK_BYTES // widths[1])
    cuts = _few_cuts(loops, begin, widths, limits.piece, limits.gap)
    if cuts is None:
        for part in _cut(move, widths, limits.piece, limits.gap):
            yield _part_of(whole, part)
    elif len(cuts) == 1:
        yield whole
    else:
        for source, dest, inner in cuts:
            place = Move(move.source + source, move.dest + dest - begin, inner)
            yield _part_of(whole, place)


def _on_grid(pieces: Iterable[Piece], grid_bytes: int) -> Iterator[Piece]:
    """Yield `pieces`, cut at each multiple of `grid_bytes` in the file where they are direct."""
    for piece in pieces:
        source, dest, loops = piece.move
        first = grid_bytes - piece.begin % grid_bytes  # bytes to the next line
        if piece.begin + first >= piece.end or not loops or piece.direct_run is None:
            yield piece
            continue
        width, size = DTYPES[piece.source_dtype].itemsize, loops[0][0]
        edges = range(first, size * width, grid_bytes)
        # An element that lies across belongs to what comes before it.
        for begin, end in pairwise((0, *(-(-edge // width) for edge in edges), size)):
            if begin < end:
                part = Move(source + begin, dest + begin, canonical([(end - begin, 1, 1)]))
                yield _part_of(piece, part)


@lru_cache(maxsize=4096)
def _few_cuts(
    loops: tuple[Loop, ...], dest: int, widths: tuple[int, int], limit: int, max_gap_bytes: int
) -> tuple[Move, ...] | None:
    """Return what `_cut` makes of loops; None where it is not worth keeping for the next tensor.

    A checkpoint has tens of thousands of tensors of a few shapes.
    """
    cuts = tuple(islice(_cut(Move(0, dest, loops), widths, limit, max_gap_bytes), _FEW + 1))
    return cuts if len(cuts) <= _FEW else None


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
