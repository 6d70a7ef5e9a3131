"""What a check finds: problems, notes, and the parts that are sound enough to look further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardstate.catalog import Catalog
from shardstate.manifest import (
    Manifest,
    PartEntry,
    Record,
    SetInfo,
)
from shardstate.names import Pattern, provenance_rank, record_rank
from shardstate.plan import Plan
from shardstate.report import Problem
from shardstate.storage import Storage
from shardstate.targets import CompareTarget, DigestTarget

# Carries out plans that read from a storage; the last argument limits each to some rows.
Execute = Callable[
    [Sequence[Plan], Storage, DigestTarget | CompareTarget, Sequence[frozenset[int]] | None], None
]


_Raw = bytes  # `Verification` counts `bytes`


@dataclass
class Verification:
    """What was looked at and what was found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[tuple[str, int, int | None]] = field(default_factory=list)  # name, bytes, rank
    tensors: int = 0
    bytes: int = 0  # of tensors
    bytes_meta: int = 0
    opaque: int = 0  # tensors that a source cannot be compared with as a whole
    opaque_bytes: int = 0
    manifest: Manifest | None = None
    manifest_bytes: _Raw = b""  # as they are, sound or not
    records: dict[int, Record] = field(default_factory=dict)

    @property
    def info(self) -> SetInfo | None:
        """What the set says of itself: its manifest, or else a record."""
        if self.manifest is not None:
            return self.manifest.info
        return next((record.info for record in self.records.values()), None)

    def remedy(self, name: str) -> str:
        """Return what mends a file of this set."""
        return remedy(self.info, name)

    def add(
        self,
        kind: str,
        file: str,
        problem: str,
        *,
        tensor: str | None = None,
        begin: int | None = None,
        end: int | None = None,
    ) -> None:
        self.problems.append(Problem(file, tensor, problem, kind, begin, end))


@dataclass
class SoundPart:
    """A rank file whose header fits its record."""

    entry: PartEntry
    rank: int
    catalog: Catalog


def remedy(info: SetInfo | None, name: str) -> str:
    """Return what mends a file: which rank is to be made again, and from where."""
    if info is None:
        return f"copy {name} again"
    place = Pattern(info.pattern, info.topology.tp, info.topology.pp).parse(name)
    known = (record_rank(name), provenance_rank(name), None if place is None else place[0])
    rank = next((each for each in known if each is not None), None)
    what = "it" if rank is None else f"rank {rank}"
    if info.source is None:
        again = "" if rank is None else f", or save rank {rank} again"
        return f"make it again from another copy (verify --repair COPY){again}"
    return f"make {what} again from {info.source.location} (verify --repair), or copy {name} again"
