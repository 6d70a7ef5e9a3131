"""Plans: which elements of stored tensors go to which elements of which tensors.

A plan is data, made without reading a weight: *copies* (a move from one tensor to another, perhaps
with a cast), *fills* (one value over a region, as for padding) and *literals* (a few bytes known
beforehand). It is held in columns; `Copy` and `Fill` are the views that people print.

Offsets and strides of a copy count elements of its `source_dtype` on the source's side and of its
`dest_dtype` on the destination's. The two differ where the copy casts. Packed types count as `U8`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

from shardstate.catalog import Catalog, Tensors
from shardstate.dtypes import CAST_NAMES, DTYPES
from shardstate.errors import NotNested, PlanError
from shardstate.layout import (
    Move,
    Region,
    Shape,
    box_move,
    canonical,
    overlap,
    union_size,
)
from shardstate.sharding import Kind, Rank, share

_FAR = 1 << 59  # elements, more than any tensor has: where sums of a hostile plan would overflow


class Copy(NamedTuple):
    """Elements of source tensor `source` that go to tensor `dest`; rows of the plan's tables."""

    source: int
    dest: int
    source_dtype: str
    dest_dtype: str
    move: Move

    @property
    def casts(self) -> bool:
        return self.source_dtype != self.dest_dtype


@dataclass(frozen=True, slots=True)
class Fill:
    """One value over a region of tensor `dest`; the region counts elements of `dtype`."""

    dest: int
    dtype: str
    region: Region
    value: bytes  # one element, little-endian


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known while planning, for tensor `dest`."""

    dest: int
    begin: int  # bytes from the tensor's first byte
    data: bytes
    opaque: str | None = None  # the operation that computed them from weights


@dataclass(frozen=True)
class Plan:
    """All that makes one rank's `tensors` out of the stored tensors of `catalog`."""

    catalog: Catalog
    tensors: Tensors
    tags: tuple[str, ...]  # dtype tags that the columns below refer to
    source: np.ndarray = field(repr=False)  # int32 row of `catalog`, per copy
    dest: np.ndarray = field(repr=False)  # int32 row of `tensors`, per copy
    source_tag: np.ndarray = field(repr=False)  # int16 index into `tags`, per copy
    dest_tag: np.ndarray = field(repr=False)
    source_offset: np.ndarray = field(repr=False)  # int64, elements
    dest_offset: np.ndarray = field(repr=False)
    loop_begin: np.ndarray = field(repr=False)  # int64, n + 1: copy i has loops [i, i + 1)
    loops: np.ndarray = field(repr=False)  # int64, shape [loops, 3]: size, source, dest stride
    fills: tuple[Fill, ...] = field(repr=False)
    literals: tuple[Literal, ...] = field(repr=False)
    # Row of `tensors` → the operation that computed some of its elements from weights. Those are
    # literals while they are known, and undefined in a plan that was read from provenance.
    opaque: Mapping[int, str] = field(repr=False, default_factory=dict)
    identity: bool = False  # made by `plan_identity`: each tensor as it is stored

    def __len__(self) -> int:
        return len(self.source)

    def copy(self, i: int) -> Copy:
        """Return the view of copy `i`."""
        begin, end = self.loop_begin[i], self.loop_begin[i + 1]
        loops = tuple((n, s, d) for n, s, d in self.loops[begin:end].tolist())
        return Copy(
            int(self.source[i]),
            int(self.dest[i]),
            self.tags[self.source_tag[i]],
            self.tags[self.dest_tag[i]],
            Move(int(self.source_offset[i]), int(self.dest_offset[i]), loops),
        )

    @cached_property
    def size(self) -> np.ndarray:
        """Elements of each copy."""
        sizes = np.append(self.loops[:, 0], 1)
        product = np.multiply.reduceat(sizes, self._first)
        rough = np.multiply.reduceat(sizes.astype(np.float64), self._first)
        return np.where(self._has_loops, np.where(rough < _FAR, product, _FAR), 1)

    @cached_property
    def source_end(self) -> np.ndarray:
        """One past the last element of the source that each copy reads."""
        ends = []
        for number in (np.int64, np.float64):
            sizes, strides = self.loops[:, 0].astype(number), self.loops[:, 1].astype(number)
            spans = np.append((sizes - 1) * strides, number(0))
            reach = np.add.reduceat(spans, self._first) * self._has_loops
            ends.append(self.source_offset + reach + 1)
        exact, rough = ends
        return np.where(rough < _FAR, exact, _FAR)

    @cached_property
    def dense(self) -> np.ndarray:
        """Whether each copy fills one run of its destination."""
        sizes, strides = self.loops[:, 0], self.loops[:, 2]
        tight = np.empty(len(self.loops) + 1, dtype=bool)
        tight[:-2] = strides[:-1] == sizes[1:] * strides[1:]
        tight[-2:] = True
        last = self.loop_begin[1:][self._has_loops] - 1
        tight[last] = strides[last] == 1
        run: np.ndarray = np.logical_and.reduceat(tight, self._first) | ~self._has_loops
        return run

    @cached_property
    def walks_once(self) -> np.ndarray:
        """Whether each copy surely reads no element of its source twice; False: perhaps."""
        count = np.diff(self.loop_begin)
        sizes = np.append(self.loops[:, 0], [1, 1])
        strides = np.append(self.loops[:, 1], [1, 1])
        outer, inner = strides[self._first], strides[self._first + 1]
        small = np.where(outer < inner, sizes[self._first], sizes[self._first + 1])
        low, high = np.minimum(outer, inner), np.maximum(outer, inner)
        found: np.ndarray = (count == 2) & (low > 0) & (high > (small - 1) * low)
        found |= (count == 0) | ((count == 1) & (outer > 0))
        return found

    @property
    def _first(self) -> np.ndarray:
        return self.loop_begin[:-1]

    @property
    def _has_loops(self) -> np.ndarray:
        return np.diff(self.loop_begin) > 0

    def __iter__(self) -> Iterator[Copy]:
        loops = [tuple(loop) for loop in self.loops.tolist()]
        tags, ends = self.tags, self.loop_begin.tolist()
        columns = (
            self.source, self.dest, self.source_tag, self.dest_tag, self.source_offset,
            self.dest_offset,
        )  # fmt: skip
        for i, (source, dest, a, b, begin, at) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            move = Move(begin, at, tuple(loops[ends[i] : ends[i + 1]]))
            yield Copy(source, dest, tags[a], tags[b], move)

    def __str__(self) -> str:
        nbytes = sum(self.tensors.nbytes(row) for row in range(len(self.tensors)))
        files = len(np.unique(self.catalog.file[self.source]))
        return (
            f"{len(self)} copies, {len(self.fills)} fills, {nbytes / 2**20:.1f} MiB "
            f"in {len(self.tensors)} tensors from {files} files"
        )


def make_plan(
    catalog: Catalog,
    tensors: Tensors,
    copies: Iterable[Copy],
    fills: Iterable[Fill] = (),
    literals: Iterable[Literal] = (),
    *,
    opaque: Mapping[int, str] | None = None,
) -> Plan:
    """Return the plan in columns; empty copies are left out.

    `opaque` is needed only where no literal says it.
    """
    tags: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int, int]] = []
    loops: list[tuple[int, int, int]] = []
    ends = [0]
    for copy in copies:
        if not copy.move.size:
            continue
        rows.append(
            (
                copy.source,
                copy.dest,
                tags.setdefault(copy.source_dtype, len(tags)),
                tags.setdefault(copy.dest_dtype, len(tags)),
                copy.move.source,
                copy.move.dest,
            )
        )
        loops.extend(copy.move.loops)
        ends.append(len(loops))
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), 6)
    return Plan(
        catalog,
        tensors,
        tuple(tags),
        columns[:, 0].astype(np.int32),
        columns[:, 1].astype(np.int32),
        columns[:, 2].astype(np.int16),
        columns[:, 3].astype(np.int16),
        columns[:, 4].copy(),
        columns[:, 5].copy(),
        np.array(ends, dtype=np.int64),
        np.array(loops, dtype=np.int64).reshape(len(loops), 3),
        tuple(fill for fill in fills if fill.region.size),
        (known := tuple(literal for literal in literals if literal.data)),
        opaque or {each.dest: each.opaque for each in known if each.opaque is not None},
    )


def plan_shares(catalog: Catalog, kinds: Sequence[Kind], *, rank: Rank, dtype: str) -> Plan:
    """Return the plan of what `rank` holds of `catalog` when row i is shared as `kinds[i]`.

    `dtype` is "keep", or what every plain float becomes ("bf16", "f16", "f32"). The tensors keep
    their names and come in the order of rank files: item size, largest first, then source file and
    offset. Shapes must have passed `check_shares`.
    """
    order = sorted(
        range(len(catalog)),
        key=lambda r: (-DTYPES[_cast(catalog.dtypes[r], dtype)].bits, r),
    )
    names, dtypes, shapes = [], [], []
    copies: list[Copy] = []
    fills: list[Fill] = []
    for dest, row in enumerate(order):
        tag = catalog.dtypes[row]
        goal = _cast(tag, dtype)
        owned = share(kinds[row], catalog.shapes[row], rank)
        move = box_move(catalog.shapes[row], owned.box, owned.shape, (0,) * len(owned.shape))
        pads = []
        # The box sits in the leading corner; what is behind it on each axis is padding.
        corner = [(0, end - begin) for begin, end in owned.box]
        for axis, ((_, end), size) in enumerate(zip(corner, owned.shape, strict=True)):
            if end < size:
                pad = [*corner[:axis], (end, size), *((0, n) for n in owned.shape[axis + 1 :])]
                pads.append(
                    box_move(owned.shape, tuple(pad), owned.shape, tuple(b for b, _ in pad))
                )
        unit = goal
        if DTYPES[tag].packed:
            try:
                move, *pads = (_in_bytes(each, DTYPES[tag].bits) for each in (move, *pads))
            except NotNested as error:
                raise NotNested(
                    f"{catalog.names[row]}: {error}", tensor=catalog.names[row]
                ) from None
            tag = unit = "U8"
        copies.append(Copy(row, dest, tag, unit, move))
        zero = bytes(DTYPES[unit].itemsize)
        fills.extend(Fill(dest, unit, pad.dest_region, zero) for pad in pads)
        names.append(catalog.names[row])
        dtypes.append(goal)
        shapes.append(owned.shape)
    return make_plan(catalog, Tensors(tuple(names), tuple(dtypes), tuple(shapes)), copies, fills)


def plan_identity(catalog: Catalog) -> Plan:
    """Return the plan that takes each tensor of `catalog` as it is stored."""
    tags: dict[str, int] = {}
    unit = [
        tags.setdefault("U8" if DTYPES[tag].packed else tag, len(tags)) for tag in catalog.dtypes
    ]
    sizes = np.array(
        [catalog.nbytes(row) // DTYPES[tag].itemsize for row, tag in enumerate(catalog.dtypes)],
        dtype=np.int64,
    )
    rows = np.flatnonzero(sizes).astype(np.int32)
    sizes, units = sizes[rows], np.array(unit, dtype=np.int16)[rows]
    looped = sizes != 1
    loops = np.ones((int(looped.sum()), 3), dtype=np.int64)
    loops[:, 0] = sizes[looped]
    zero = np.zeros(len(rows), dtype=np.int64)
    return Plan(
        catalog,
        Tensors(catalog.names, catalog.dtypes, catalog.shapes),
        tuple(tags),
        rows,
        rows,
        units,
        units,
        zero,
        zero,
        np.append(0, np.cumsum(looped)),
        loops,
        (),
        (),
        identity=True,
    )


def faults(plan: Plan) -> list[str]:
    """Return what keeps `plan` from defining each element of its tensors exactly once."""
    found: list[str] = []
    writes: dict[int, list[Region]] = defaultdict(list)  # in bytes of the destination
    widths = np.array([DTYPES[tag].itemsize for tag in plan.tags], dtype=np.int64)
    stored = np.array([plan.catalog.nbytes(row) for row in range(len(plan.catalog))])
    for i in np.flatnonzero(plan.source_end * widths[plan.source_tag] > stored[plan.source]):
        name = plan.tensors.names[plan.dest[i]]
        found.append(f"{name}: reads past {plan.catalog.names[plan.source[i]]}")
    made = np.array([plan.tensors.nbytes(row) for row in range(len(plan.tensors))])
    done = _tiled(plan, made, widths[plan.dest_tag])
    for i in np.flatnonzero(~done[plan.dest]):
        copy = plan.copy(i)
        width = DTYPES[copy.dest_dtype].itemsize
        writes[copy.dest].append(region_in_bytes(copy.move.dest_region, width))
    for fill in plan.fills:
        writes[fill.dest].append(region_in_bytes(fill.region, DTYPES[fill.dtype].itemsize))
    for literal in plan.literals:
        writes[literal.dest].append(Region(literal.begin, ((len(literal.data), 1),)))
    for row, name in enumerate(plan.tensors.names):
        if done[row]:
            continue
        regions, nbytes = writes.get(row, []), int(made[row])
        covered = sum(region.size for region in regions)
        if any(region.offset < 0 or region.end > nbytes for region in regions):
            found.append(f"{name}: writes past its end")
        elif covered < nbytes and row not in plan.opaque:
            found.append(f"{name}: {nbytes - covered} of {nbytes} bytes are not defined")
        else:
            try:
                if overlap(regions) is not None:
                    found.append(f"{name}: elements are written twice")
            except NotNested as error:
                found.append(f"{name}: {error}")
    return found


def _tiled(plan: Plan, made: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return which tensors, of `made` bytes, are runs that lie end to end, and nothing else.

    Nearly all are; they are told without a loop. `width`: bytes of an element, by copy.
    """
    dest, sized = plan.dest, made[plan.dest]
    run = plan.dense & (plan.dest_offset >= 0)
    run &= (plan.dest_offset <= sized) & (plan.size <= sized)  # no sum below leaves its type
    tiled = np.bincount(dest, minlength=len(made)) > 0
    tiled[dest[~run]] = False
    tiled[[fill.dest for fill in plan.fills]] = False
    tiled[[literal.dest for literal in plan.literals]] = False
    runs = np.flatnonzero(tiled[dest])
    runs = runs[np.lexsort((plan.dest_offset[runs], dest[runs]))]
    row, begin = dest[runs], plan.dest_offset[runs] * width[runs]
    end = begin + plan.size[runs] * width[runs]
    first = np.append(True, row[1:] != row[:-1])[: len(runs)]
    expected = np.where(first, 0, np.append(0, end[:-1])[: len(runs)])
    tiled[row[begin != expected]] = False
    last = np.append(row[1:] != row[:-1], True)[: len(runs)]
    tiled[row[last & (end != made[row])]] = False
    return tiled


def check_plan(plan: Plan) -> None:
    """Raise `PlanError` that lists all `faults` of `plan`."""
    if found := faults(plan):
        raise PlanError(f"the plan has {len(found)} faults: {'; '.join(found)}")


def bytes_wanted(plans: Iterable[Plan]) -> int:
    """Return the size of the union of all source bytes that the copies of `plans` read.

    The plans have one catalog. A byte that several of them need counts once.
    """
    plans = list(plans)
    regions: dict[int, dict[tuple[object, ...], Copy]] = defaultdict(dict)
    catalog: Catalog | None = None
    total = 0
    readers = np.sum(
        [np.bincount(plan.source, minlength=len(plan.catalog)) for plan in plans], axis=0
    )
    for plan in plans:
        catalog = plan.catalog
        offsets, ends = plan.source_offset.tolist(), plan.loop_begin.tolist()
        # Most tensors have one reader, who needs no element twice: told without a loop.
        plain = plan.walks_once & (readers[plan.source] == 1)
        itemsizes = np.array([DTYPES[tag].itemsize for tag in plan.tags], dtype=np.int64)
        total += int((plan.size * itemsizes[plan.source_tag])[plain].sum())
        rows = plan.source.tolist()
        for i in np.flatnonzero(~plain).tolist():
            row = rows[i]
            # Ranks that hold the same region are told apart without making a view of each.
            loops = plan.loops[ends[i] : ends[i + 1], :2].tobytes()
            seen = regions[row]
            key = (offsets[i], loops, plan.tags[plan.source_tag[i]])
            if key not in seen:
                seen[key] = plan.copy(i)
    for row, found in regions.items():
        touched = [(c.move.source_region, DTYPES[c.source_dtype].itemsize) for c in found.values()]
        widths = {width for _, width in touched}
        try:
            if len(widths) == 1:
                total += union_size(region for region, _ in touched) * widths.pop()
            else:
                total += union_size(region_in_bytes(region, width) for region, width in touched)
        except NotNested as error:
            assert catalog is not None
            name = catalog.names[row]
            raise NotNested(f"{name}: {error}; shard from the source", tensor=name) from None
    return total


def padding_boxes(fills: Iterable[Fill], tensors: Tensors) -> dict[str, list[list[list[int]]]]:
    """Return the boxes without weights, by tensor name: per axis [begin, end), in elements.

    Zeros are; another constant is set by code.
    """
    boxes: dict[str, list[list[list[int]]]] = {}
    for fill in fills:
        dtype = DTYPES[tensors.dtypes[fill.dest]]
        if any(fill.value):
            continue
        region = _in_elements(fill.region, dtype.bits) if dtype.packed else fill.region
        boxes.setdefault(tensors.names[fill.dest], []).extend(
            _boxes_of(region, tensors.shapes[fill.dest])
        )
    return boxes


def _boxes_of(region: Region, shape: Shape) -> list[list[list[int]]]:
    """Return the boxes of `shape` that make up `region`: one, or one for each outer iteration."""
    try:
        return [_box_of(region, shape)]
    except NotNested:
        if not region.loops:
            raise
        (n, stride), *inner = region.loops
        parts = (Region(region.offset + i * stride, tuple(inner)) for i in range(n))
        return [box for part in parts for box in _boxes_of(part, shape)]


def _box_of(region: Region, shape: Shape) -> list[list[int]]:
    """Return the box of `shape` that `region` covers; `NotNested` if it is none."""
    size, end = region.size, region.end - 1
    box = []
    below = prod(shape)
    first, last = region.offset, end
    for n in shape:
        below //= n
        box.append([first // below, last // below + 1])
        first, last = first % below, last % below
    if prod(e - b for b, e in box) != size:
        raise NotNested(f"the padding {region} is no box of shape {list(shape)}")
    return box


def _cast(tag: str, dtype: str) -> str:
    goal = CAST_NAMES[dtype]
    return goal if goal is not None and DTYPES[tag].floating else tag


def region_in_bytes(region: Region, width: int) -> Region:
    """Return `region` in bytes, for elements of `width` bytes."""
    if width == 1:
        return region
    loops = canonical([*((n, s * width, s * width) for n, s in region.loops), (width, 1, 1)])
    return Region(region.offset * width, tuple((n, s) for n, s, _ in loops))


def _in_bytes(move: Move, bits: int) -> Move:
    """Return a move of packed elements of `bits` bits counted in bytes.

    `NotNested` where it begins or ends inside a byte.
    """
    loops = list(move.loops)
    if not move.size:
        return Move(0, 0, ((0, 0, 0),))
    inner = loops.pop() if loops and loops[-1][1:] == (1, 1) else (1, 1, 1)
    numbers = (move.source, move.dest, inner[0], *(x for _, s, d in loops for x in (s, d)))
    if any(number * bits % 8 for number in numbers):
        raise NotNested(f"a share of {bits}-bit elements begins or ends inside a byte")
    scaled = [(n, s * bits // 8, d * bits // 8) for n, s, d in loops]
    scaled.append((inner[0] * bits // 8, 1, 1))
    return Move(move.source * bits // 8, move.dest * bits // 8, canonical(scaled))


def _in_elements(region: Region, bits: int) -> Region:
    """Return a region in bytes counted in packed elements of `bits` bits, which fill it."""
    loops = list(region.loops)
    inner = loops.pop()[0] if loops and loops[-1][1] == 1 else 1
    scaled = [*((n, s * 8 // bits) for n, s in loops), (inner * 8 // bits, 1)]
    return Region(region.offset * 8 // bits, tuple(scaled))
