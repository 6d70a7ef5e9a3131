"""Composition and inverse of plans: what reshards, merges and loads into strided memory.

Over tensors in the middle that both plans know by name; elements by `layout.compose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from shardstate.catalog import Catalog, Tensors
from shardstate.dtypes import DTYPES, cast_array, numpy_dtype
from shardstate.errors import NotNested, PlanError
from shardstate.layout import (
    Move,
    Region,
    canonical,
    compose,
    inverse,
)
from shardstate.plan import Copy, Fill, Literal, Plan, make_plan


def compose_plans(first: Plan, second: Plan) -> Plan:
    """Return the plan A → C of `first` (A → B) followed by `second` (B → C).

    Tensors of B are matched by name; those that only one plan has are left out. Raises `NotNested`
    by name where strides do not nest, `PlanError` where both plans cast the same elements.
    """
    middle = second.catalog
    if first.identity and (middle.names, middle.dtypes, middle.shapes) == (
        first.catalog.names, first.catalog.dtypes, first.catalog.shapes,
    ):  # fmt: skip
        return replace(second, catalog=first.catalog)
    made: dict[str, tuple[list[Copy], list[Fill], list[Literal]]] = defaultdict(
        lambda: ([], [], [])
    )
    for copy in first:
        made[first.tensors.names[copy.dest]][0].append(copy)
    for fill in first.fills:
        made[first.tensors.names[fill.dest]][1].append(fill)
    for literal in first.literals:
        made[first.tensors.names[literal.dest]][2].append(literal)
    copies: list[Copy] = []
    fills: list[Fill] = list(second.fills)
    literals: list[Literal] = list(second.literals)
    for then in second:
        name = second.catalog.names[then.source]
        try:
            for copy in made[name][0]:
                copies.extend(compose_copy(copy, then))
            for fill in made[name][1]:
                fills.extend(_compose_fill(fill, then))
            for literal in made[name][2]:
                literals.extend(_compose_literal(literal, then))
        except (NotNested, PlanError) as error:
            raise type(error)(f"{name}: {error}; shard from the source", tensor=name) from None
    return make_plan(first.catalog, second.tensors, copies, fills, literals)


def invert_plan(plan: Plan, stored: Catalog) -> Plan:
    """Return the plan that puts the tensors of `plan`, as `stored` by name, back to its source.

    Fills and literals vanish: they come from no source. Elements of the source that `plan` did not
    read stay undefined. Raises `PlanError` by name where a copy casts, for that loses bits.
    """
    copies = []
    for copy in plan:
        name = plan.tensors.names[copy.dest]
        if copy.casts:
            raise PlanError(
                f"{name}: was cast from {copy.source_dtype} to {copy.dest_dtype}, "
                f"which cannot be undone",
                tensor=name,
            )
        if name not in stored.row:
            raise PlanError(f"{name}: is not among the stored tensors", tensor=name)
        copies.append(
            Copy(
                stored.row[name],
                copy.source,
                copy.dest_dtype,
                copy.source_dtype,
                inverse(copy.move),
            )
        )
    source = plan.catalog
    return make_plan(stored, Tensors(source.names, source.dtypes, source.shapes), copies)


def _move_scaled(move: Move, width: int) -> Move:
    loops = canonical([*((n, s * width, d * width) for n, s, d in move.loops), (width, 1, 1)])
    return Move(move.source * width, move.dest * width, loops)


def _same_unit(
    a_dtype: str, b_dtype: str, casts: bool, a: Move, b: Move
) -> tuple[Move, Move, bool]:
    """Return both moves with one element type in the middle, and whether that became bytes."""
    if a_dtype == b_dtype:
        return a, b, False
    if casts:
        raise PlanError(f"a cast meets elements counted as {a_dtype} and as {b_dtype}")
    return (
        _move_scaled(a, DTYPES[a_dtype].itemsize),
        _move_scaled(b, DTYPES[b_dtype].itemsize),
        True,
    )


def compose_copy(copy: Copy, then: Copy) -> Iterator[Copy]:
    """Yield the copies that `copy` followed by `then`, out of its destination, makes.

    `PlanError` where both cast and one cast cannot do it, `NotNested` as `layout.compose`.
    """
    into = then.move
    if (
        copy.dest_dtype == then.source_dtype == then.dest_dtype
        and len(into.loops) == 1
        and into.loops[0][1:] == (1, 1)
        and into.source <= copy.move.dest
        and copy.move.dest_region.end <= into.source + into.loops[0][0]
    ):  # `then` keeps all of it as it is: so it is for nearly all parameters
        begin = copy.move.dest - into.source + into.dest
        yield copy._replace(dest=then.dest, move=copy.move._replace(dest=begin))
        return
    # Every cast rounds through F32, so that a stop there, or at F64, changes nothing.
    exact = copy.dest_dtype in ("F32", "F64") and (copy.source_dtype, then.dest_dtype) != (
        "F64", "F64",
    )  # fmt: skip
    if copy.casts and then.casts and not exact:
        raise PlanError(
            f"was cast from {copy.source_dtype} to {copy.dest_dtype} and would be cast again "
            f"to {then.dest_dtype}"
        )
    a, b, as_bytes = _same_unit(
        copy.dest_dtype, then.source_dtype, copy.casts or then.casts, copy.move, then.move
    )
    source = "U8" if as_bytes else copy.source_dtype
    dest = "U8" if as_bytes else then.dest_dtype
    for move in compose(a, b):
        yield Copy(copy.source, then.dest, source, dest, move)


def _constant(region: Region) -> Move:
    """A region written from nowhere: a move whose source side stands still."""
    return Move(0, region.offset, canonical((n, 0, s) for n, s in region.loops))


def _compose_fill(fill: Fill, then: Copy) -> Iterator[Fill]:
    value, dtype = fill.value, then.dest_dtype
    if fill.dtype != then.source_dtype:
        raise PlanError(f"a fill of {fill.dtype} meets elements counted as {then.source_dtype}")
    if then.casts:
        array = np.frombuffer(value, dtype=numpy_dtype(then.source_dtype))
        value = cast_array(array, then.dest_dtype).tobytes()
    for move in compose(_constant(fill.region), then.move):
        yield Fill(then.dest, dtype, move.dest_region, value)


def _compose_literal(literal: Literal, then: Copy) -> Iterator[Literal]:
    """Cut what `then` takes of a literal into literals, one for each run of the destination."""
    width = DTYPES[then.source_dtype].itemsize
    if literal.begin % width or len(literal.data) % width:
        raise PlanError(f"a literal does not hold whole elements of {then.source_dtype}")
    values = np.frombuffer(literal.data, dtype=numpy_dtype(then.source_dtype))
    first = Move(0, literal.begin // width, canonical([(len(values), 1, 1)]))
    for move in compose(first, then.move):
        taken = cast_array(
            values[_indices(move, lambda loop: loop[1], move.source)], then.dest_dtype
        )
        at = _indices(move, lambda loop: loop[2], move.dest)
        size = taken.dtype.itemsize
        for i in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) != 1) + 1):
            yield Literal(then.dest, int(at[i[0]]) * size, taken[i].tobytes())


def _indices(move: Move, stride: Callable[[tuple[int, int, int]], int], offset: int) -> np.ndarray:
    """Return the element offsets of one side of `move`, in the order it is walked."""
    found = np.array([offset], dtype=np.int64)
    for loop in move.loops:
        found = (found[:, None] + np.arange(loop[0]) * stride(loop)).reshape(-1)
    return found
