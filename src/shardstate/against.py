"""Compares a set with its source: every rank is made anew in memory, by its provenance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardstate.catalog import Catalog, Tensors, merge_catalogs
from shardstate.checkpoint import (
    Checkpoint,
)
from shardstate.errors import (
    InputError,
    PathNotFound,
)
from shardstate.findings import Execute, SoundPart, Verification
from shardstate.manifest import (
    MAX_JSON_BYTES,
)
from shardstate.names import (
    MANIFEST,
    provenance_name,
)
from shardstate.plan import Plan, make_plan
from shardstate.provenance import parse_provenance
from shardstate.storage import Storage
from shardstate.targets import CompareTarget


def compare_with_source(
    storage: Storage,
    found: Verification,
    parts: Sequence[SoundPart],
    source: Checkpoint,
    execute: Execute,
) -> None:
    """Make every rank anew from the source, in memory, and compare it with what is stored."""
    plans: list[Plan] = []
    stored: list[tuple[Tensors, Catalog]] = []
    wanted: list[frozenset[int]] = []
    differ: set[str] = set()
    assert source.catalog is not None
    for record in found.records.values():
        name = provenance_name(record.rank)
        if record.provenance is None:
            found.add("source", name, "the set has no provenance: its source cannot be compared")
            continue
        try:
            data = storage.read(name, limit=MAX_JSON_BYTES)
            plan = parse_provenance(data, file=name, set_id=record.set, rank=record.rank)
        except PathNotFound:
            continue  # listed as missing already
        except InputError as error:
            if not any(problem.file == name for problem in found.problems):
                found.add("digest", name, str(error))
            continue
        catalog = merge_catalogs([part.catalog for part in parts if part.rank == record.rank])
        rebased, absent = rebased_plan(plan, source.catalog)
        differ |= absent
        for row, how in plan.opaque.items():
            lost = plan.tensors.names[row]
            found.opaque += 1
            found.opaque_bytes += plan.tensors.nbytes(row)
            found.notes.append(
                f"{lost} of rank {record.rank} was computed ({how}): not compared as a whole"
            )
        plans.append(rebased)
        stored.append((rebased.tensors, catalog))
        wanted.append(_comparable(found, name, rebased, catalog, absent, plan))
    for name in sorted(differ):
        found.add(
            "source",
            MANIFEST,
            "the source given holds no such tensor with that dtype and shape: it is not the "
            "source of this set",
            tensor=name,
        )
    target = CompareTarget(storage, stored)
    execute(plans, source.storage, target, wanted)
    for difference in target.differences:
        catalog = stored[difference.slot][1]
        tensor = catalog.tensor(catalog.row[plans[difference.slot].tensors.names[difference.dest]])
        found.add(
            "source",
            tensor.file,
            f"differs from the source; {found.remedy(tensor.file)}",
            tensor=tensor.name,
            begin=tensor.begin + difference.begin,
            end=tensor.begin + difference.end,
        )


def rebased_plan(plan: Plan, source: Catalog) -> tuple[Plan, set[str]]:
    """Return `plan` reading from `source` by name, and the names that are not there alike."""
    old = plan.catalog
    rows = np.full(len(old), -1, dtype=np.int64)
    for row, name in enumerate(old.names):
        at = source.row.get(name)
        if at is not None and (source.dtypes[at], source.shapes[at]) == (
            old.dtypes[row], old.shapes[row]
        ):  # fmt: skip
            rows[row] = at
    used = {old.names[row] for row in np.unique(plan.source) if rows[row] < 0}
    copies = [
        copy._replace(source=int(rows[copy.source])) for copy in plan if rows[copy.source] >= 0
    ]
    return make_plan(
        source, plan.tensors, copies, plan.fills, plan.literals, opaque=plan.opaque
    ), used


def _comparable(
    found: Verification, name: str, plan: Plan, stored: Catalog, absent: set[str], original: Plan
) -> frozenset[int]:
    """Return the rows of the plan's tensors that are stored alike and have their sources."""
    lost = {copy.dest for copy in original if original.catalog.names[copy.source] in absent}
    sound = []
    for row, tensor in enumerate(plan.tensors.names):
        at = stored.row.get(tensor)
        if at is None and not found.problems:
            found.add("missing", name, "names a tensor that no rank file holds", tensor=tensor)
        if at is None or row in lost:
            continue  # its file is listed as missing or damaged, or its source as another
        if (stored.dtypes[at], stored.shapes[at]) != (
            plan.tensors.dtypes[row], plan.tensors.shapes[row]
        ):  # fmt: skip
            found.add(
                "digest", name, "says another dtype or shape than the rank file", tensor=tensor
            )
            continue
        sound.append(row)
    return frozenset(sound)
