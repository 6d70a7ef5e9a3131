"""A set read as the source that it was made from: the inverse of its ranks' plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

from shardstate.catalog import Catalog, Tensors, merge_catalogs
from shardstate.errors import PlanError
from shardstate.layout import Move, inverse, subtract
from shardstate.plan import Copy, Plan, check_plan, make_plan


def plan_source(ranks: Sequence[tuple[Plan, Catalog]], *, prefer: int = 0) -> Plan:
    """Return the plan that makes the tensors of the source out of the rank files of a set.

    `ranks` has each rank's provenance and what it stores. What several ranks hold is taken from
    the one with the number `prefer`, else from the lowest. A tensor that was cast comes in the
    dtype that is stored. Raises `PlanError` for plans of different sources, and for tensors that
    the set does not hold whole.
    """
    source = ranks[0][0].catalog
    stored = merge_catalogs([catalog for _, catalog in ranks])
    offsets = [0, *accumulate(len(catalog) for _, catalog in ranks)]
    dtypes = list(source.dtypes)
    copies: dict[int, list[Copy]] = defaultdict(list)
    order = [prefer, *(i for i in range(len(ranks)) if i != prefer)]
    for number in order:
        plan, catalog = ranks[number]
        if (plan.catalog.names, plan.catalog.shapes) != (source.names, source.shapes):
            raise PlanError("the ranks of the set were made from different sources")
        for copy in plan:
            name = plan.tensors.names[copy.dest]
            if name not in catalog.row:
                raise PlanError(f"{name}: is not among the stored tensors", tensor=name)
            if copy.casts:
                dtypes[copy.source] = copy.dest_dtype
            tag = copy.dest_dtype
            known = copies[copy.source]
            moves = [inverse(copy.move)]
            for other in known:
                moves = _outside(moves, other.move)
            row = offsets[number] + catalog.row[name]
            known.extend(Copy(row, copy.source, tag, tag, move) for move in moves)
    tensors = Tensors(source.names, tuple(dtypes), source.shapes)
    made = make_plan(stored, tensors, (copy for each in copies.values() for copy in each))
    check_plan(made)
    return made


def _outside(moves: Sequence[Move], other: Move) -> list[Move]:
    """Return what `moves` write outside of what `other` writes."""
    region = other.dest_region
    return [rest for move in moves for rest in subtract(move, region)]
