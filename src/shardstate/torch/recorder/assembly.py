"""Entries → plan: rows of the catalog become copies, values become fills and literals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardstate.catalog import Catalog, Tensors
from shardstate.dtypes import DTYPES, cast_array, numpy_dtype
from shardstate.layout import runs
from shardstate.plan import Copy, Fill, Literal, Plan, make_plan


@dataclass(frozen=True, slots=True)
class Value:
    """Bytes that the loading code wrote; `origin` is the operation that made them of weights."""

    data: np.ndarray  # uint8
    origin: str | None


def assemble(
    catalog: Catalog,
    tensors: Tensors,
    entries: Sequence[Iterable[Copy]],
    values: Sequence[Value],
) -> Plan:
    """Return the plan whose tensor i is made by `entries[i]`; what is not known is left out."""
    copies: list[Copy] = []
    fills: list[Fill] = []
    literals: list[Literal] = []
    for dest, each in enumerate(entries):
        for entry in each:
            if entry.source >= 0:
                copies.append(entry._replace(dest=dest) if dest else entry)
                continue
            value = values[-2 - entry.source]
            if value.origin is None and len(value.data) == DTYPES[entry.source_dtype].itemsize:
                one = value.data.view(numpy_dtype(entry.source_dtype))
                raw = cast_array(one, entry.dest_dtype).tobytes()
                fills.append(Fill(dest, entry.dest_dtype, entry.move.dest_region, raw))
            else:
                literals.extend(_literals(dest, entry, value))
    return make_plan(catalog, tensors, copies, fills, literals)


def _literals(dest: int, entry: Copy, value: Value) -> Iterator[Literal]:
    """Yield what an entry takes of a value, as literals: one for each run of the destination."""
    tag = entry.source_dtype
    loops = entry.move.loops
    width = DTYPES[tag].itemsize
    taken = np.ndarray(
        tuple(n for n, _, _ in loops),
        dtype=numpy_dtype(tag),
        buffer=value.data.data,
        offset=entry.move.source * width,
        strides=tuple(s * width for _, s, _ in loops),
    )
    flat = cast_array(np.ascontiguousarray(taken), entry.dest_dtype).reshape(-1).view(np.uint8)
    width = DTYPES[entry.dest_dtype].itemsize
    at = 0
    for begin, end in runs(entry.move.dest_region):
        size = (end - begin) * width
        yield Literal(dest, begin * width, flat[at : at + size].tobytes(), value.origin)
        at += size
