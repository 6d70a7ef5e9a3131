"""Provenance: a rank's plan and the catalog of its source, as the JSON file beside its record."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

import msgspec
import numpy as np

from shardstate.catalog import Catalog, Tensors, is_file_name
from shardstate.dtypes import DTYPES
from shardstate.errors import SetError
from shardstate.layout import Move, Region, element_count
from shardstate.manifest import VERSION, Natural, SetId, decode, seal, unseal
from shardstate.plan import Copy, Fill, Literal, Plan, faults, make_plan

_Tag = Annotated[str, msgspec.Meta(max_length=16)]
# More axes than any array has make every product and every comparison slow.
_Shape = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=64)]
_Moves = Annotated[tuple[tuple[Natural, Natural, Natural], ...], msgspec.Meta(max_length=64)]
_Places = Annotated[tuple[tuple[Natural, Natural], ...], msgspec.Meta(max_length=64)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})*\Z")]


class _File(msgspec.Struct):
    name: str
    bytes: Natural


class _Tensors(msgspec.Struct):
    name: tuple[str, ...]
    dtype: tuple[_Tag, ...]
    shape: tuple[_Shape, ...]


class _Stored(msgspec.Struct):
    name: tuple[str, ...]
    dtype: tuple[_Tag, ...]
    shape: tuple[_Shape, ...]
    file: tuple[Natural, ...]
    begin: tuple[Natural, ...]


class _Source(msgspec.Struct):
    files: tuple[_File, ...]
    tensors: _Stored


class _Copies(msgspec.Struct):
    source: tuple[Natural, ...]
    dest: tuple[Natural, ...]
    source_dtype: tuple[_Tag, ...]
    dest_dtype: tuple[_Tag, ...]
    source_offset: tuple[Natural, ...]
    dest_offset: tuple[Natural, ...]
    loops: tuple[_Moves, ...]


class _Fills(msgspec.Struct):
    dest: tuple[Natural, ...]
    dtype: tuple[_Tag, ...]
    offset: tuple[Natural, ...]
    loops: tuple[_Places, ...]
    value: tuple[_Hex, ...]


class _Literals(msgspec.Struct):
    dest: tuple[Natural, ...]
    begin: tuple[Natural, ...]
    data: tuple[_Hex, ...]


class _Provenance(msgspec.Struct):
    set: SetId
    rank: Natural
    source: _Source
    tensors: _Tensors
    copies: _Copies
    fills: _Fills
    literals: _Literals
    opaque: dict[str, str]


def provenance_json(plan: Plan, *, set_id: str, rank: int) -> bytes:
    """Return the provenance file of `rank`, whose tensors `plan` makes."""
    source, tensors = plan.catalog, plan.tensors
    known = [literal for literal in plan.literals if literal.opaque is None]
    ends = plan.loop_begin.tolist()
    loops = plan.loops.tolist()
    return seal(
        {
            "version": VERSION,
            "set": set_id,
            "rank": rank,
            "source": {
                "files": [
                    {"name": name, "bytes": size}
                    for name, size in zip(source.files, source.file_bytes, strict=True)
                ],
                "tensors": {
                    "name": source.names,
                    "dtype": source.dtypes,
                    "shape": source.shapes,
                    "file": source.file.tolist(),
                    "begin": source.begin.tolist(),
                },
            },
            "tensors": {"name": tensors.names, "dtype": tensors.dtypes, "shape": tensors.shapes},
            "copies": {
                "source": plan.source.tolist(),
                "dest": plan.dest.tolist(),
                "source_dtype": [plan.tags[i] for i in plan.source_tag],
                "dest_dtype": [plan.tags[i] for i in plan.dest_tag],
                "source_offset": plan.source_offset.tolist(),
                "dest_offset": plan.dest_offset.tolist(),
                "loops": [loops[b:e] for b, e in pairwise(ends)],
            },
            "fills": {
                "dest": [f.dest for f in plan.fills],
                "dtype": [f.dtype for f in plan.fills],
                "offset": [f.region.offset for f in plan.fills],
                "loops": [f.region.loops for f in plan.fills],
                "value": [f.value.hex() for f in plan.fills],
            },
            "literals": {
                "dest": [x.dest for x in known],
                "begin": [x.begin for x in known],
                "data": [x.data.hex() for x in known],
            },
            "opaque": {tensors.names[row]: how for row, how in sorted(plan.opaque.items())},
        }
    )


def parse_provenance(data: bytes, *, file: str, set_id: str, rank: int) -> Plan:
    """Return the plan of a provenance file; `SetError` unless it is sound and of that rank."""
    found = decode(unseal(data, file=file), _Provenance, file=file)
    if (found.set, found.rank) != (set_id, rank):
        raise SetError(
            f"{file}: is the provenance of rank {found.rank} of set {found.set}, expected rank "
            f"{rank} of {set_id}; files were swapped or left over",
            file=file,
        )
    for table in (found.source.tensors, found.tensors, found.copies, found.fills, found.literals):
        columns = [getattr(table, name) for name in table.__struct_fields__]
        if len({len(column) for column in columns}) != 1:
            raise SetError(f"{file}: columns of different lengths", file=file)
    stored, tensors, copies = found.source.tensors, found.tensors, found.copies
    tags = {
        *stored.dtype, *tensors.dtype, *copies.source_dtype, *copies.dest_dtype, *found.fills.dtype
    }  # fmt: skip
    if unknown := sorted(tags - set(DTYPES)):
        raise SetError(f"{file}: unknown dtypes {unknown}", file=file)
    rows = {
        "file": (stored.file, len(found.source.files)),
        "source": (copies.source, len(stored.name)),
        "dest": (
            (*copies.dest, *found.fills.dest, *found.literals.dest),
            len(tensors.name),
        ),
    }
    for what, (values, limit) in rows.items():
        if any(value >= limit for value in values):
            raise SetError(f"{file}: a {what} refers to a row that is not there", file=file)
    if strange := sorted(set(found.opaque) - set(tensors.name)):
        raise SetError(
            f"{file}: says that {strange[0]} is opaque, which it does not hold", file=file
        )
    for each in found.source.files:
        if not is_file_name(each.name):
            raise SetError(
                f"{file}: its source has a file {each.name!r}, which is no plain file name",
                file=file,
            )
    _check_sizes(stored.name, stored.dtype, stored.shape, file=file)
    _check_sizes(tensors.name, tensors.dtype, tensors.shape, file=file)
    catalog = Catalog(
        stored.name,
        stored.dtype,
        stored.shape,
        tuple(f.name for f in found.source.files),
        tuple(f.bytes for f in found.source.files),
        np.array(stored.file, dtype=np.int32),
        np.array(stored.begin, dtype=np.int64),
    )
    plan = make_plan(
        catalog,
        Tensors(tensors.name, tensors.dtype, tensors.shape),
        (
            Copy(source, dest, a, b, Move(begin, at, loops))
            for source, dest, a, b, begin, at, loops in zip(
                copies.source,
                copies.dest,
                copies.source_dtype,
                copies.dest_dtype,
                copies.source_offset,
                copies.dest_offset,
                copies.loops,
                strict=True,
            )
        ),
        (
            Fill(dest, dtype, Region(offset, loops), bytes.fromhex(value))
            for dest, dtype, offset, loops, value in zip(
                found.fills.dest,
                found.fills.dtype,
                found.fills.offset,
                found.fills.loops,
                found.fills.value,
                strict=True,
            )
        ),
        (
            Literal(dest, begin, bytes.fromhex(value))
            for dest, begin, value in zip(
                found.literals.dest, found.literals.begin, found.literals.data, strict=True
            )
        ),
        opaque={
            row: found.opaque[name] for row, name in enumerate(tensors.name) if name in found.opaque
        },
    )
    if wrong := [*_misfits(plan), *faults(plan)]:
        raise SetError(f"{file}: its plan is unsound: {'; '.join(wrong[:5])}", file=file)
    return plan


def _misfits(plan: Plan) -> Iterator[str]:
    """Yield what in `plan` does not fit its types and files; `faults` tells of the rest."""
    catalog, tensors = plan.catalog, plan.tensors
    for row, (file, begin) in enumerate(
        zip(catalog.file.tolist(), catalog.begin.tolist(), strict=True)
    ):
        if begin + catalog.nbytes(row) > catalog.file_bytes[file]:
            yield f"{catalog.names[row]}: ends past its file"
    for dest, a, b in zip(
        plan.dest.tolist(), plan.source_tag.tolist(), plan.dest_tag.tolist(), strict=True
    ):
        if a != b and not (DTYPES[plan.tags[a]].floating and DTYPES[plan.tags[b]].floating):
            yield f"{tensors.names[dest]}: casts {plan.tags[a]} to {plan.tags[b]}"
    for fill in plan.fills:
        if len(fill.value) != DTYPES[fill.dtype].itemsize:
            yield (
                f"{tensors.names[fill.dest]}: a fill of {fill.dtype} has {len(fill.value)} bytes, "
                f"expected {DTYPES[fill.dtype].itemsize}"
            )


def _check_sizes(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    *,
    file: str,
) -> None:
    if len(set(names)) != len(names):
        raise SetError(f"{file}: names a tensor twice", file=file)
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        elements = element_count(shape)
        bits = None if elements is None else elements * DTYPES[dtype].bits
        if bits is None or bits >= 2**63 or bits % 8:
            large = bits is None or bits >= 2**63
            what = "is too large" if large else f"does not fill whole bytes of {dtype}"
            raise SetError(f"{file}: {name} {what}: {list(shape)}", file=file, tensor=name)
