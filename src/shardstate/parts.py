"""Rank files before they are written: which tensors go into which part, and each header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardstate.catalog import Tensors
from shardstate.digest import digest_of
from shardstate.header import serialise_header
from shardstate.names import Pattern

ALIGN_BYTES = 4096  # data of a rank file begins at a multiple of this


@dataclass(frozen=True)
class PartFile:
    """One rank file to be written."""

    name: str
    rank: int
    part: int
    header: bytes = field(repr=False)  # with its length prefix and padding
    rows: tuple[int, ...] = field(repr=False)  # of the plan's tensors, in file order
    begins: tuple[int, ...] = field(repr=False)  # of each, bytes from the start of the file
    nbytes: int  # size of the file

    @property
    def header_digest(self) -> str:
        return digest_of(self.header)


def plan_parts(
    tensors: Tensors, *, rank: int, set_id: str, pattern: Pattern, max_part_bytes: int
) -> list[PartFile]:
    """Return the parts of a rank: tensors in their order, as many to a part as fit.

    `max_part_bytes` counts tensor bytes; a larger tensor gets a part of its own. A rank without
    tensors has one empty part.
    """
    groups: list[list[int]] = [[]]
    room = max_part_bytes
    for row in range(len(tensors)):
        nbytes = tensors.nbytes(row)
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_part_bytes
        groups[-1].append(row)
        room -= nbytes
    return [
        part_file(tensors, rows, rank=rank, part=part, set_id=set_id, name=pattern.name(rank, part))
        for part, rows in enumerate(groups)
    ]


def part_file(
    tensors: Tensors, rows: Sequence[int], *, rank: int, part: int, set_id: str, name: str
) -> PartFile:
    """Return one part that holds `rows` of `tensors`, in that order."""
    header = serialise_header(
        (
            (tensors.names[row], tensors.dtypes[row], tensors.shapes[row], tensors.nbytes(row))
            for row in rows
        ),
        metadata={
            "format": "pt",
            "shardstate": "1",
            "rank": str(rank),
            "part": str(part),
            "set": set_id,
        },
        align=ALIGN_BYTES,
    )
    begins, at = [], len(header)
    for row in rows:
        begins.append(at)
        at += tensors.nbytes(row)
    return PartFile(name, rank, part, header, tuple(rows), tuple(begins), at)
