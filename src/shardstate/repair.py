"""Makes the damaged files of a set again, and only these: from its source, or from another copy.

Nothing is written that does not have the digest which the rest of the set expects of it. What that
digest is follows from the manifest, which itself follows from the records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from shardstate.against import rebased_plan
from shardstate.catalog import catalog_of, merge_catalogs
from shardstate.checkpoint import Checkpoint, read_header
from shardstate.commit import companions_of, publish_manifest
from shardstate.digest import digest_of, rank_file_digest
from shardstate.errors import InputError, SetError, ShardStateError
from shardstate.findings import Verification
from shardstate.inventory import Found, look
from shardstate.manifest import (
    MAX_JSON_BYTES,
    FileEntry,
    Manifest,
    PartEntry,
    Record,
    Sealed,
    SmallFile,
    manifest_json,
    parse_manifest,
    record_json,
)
from shardstate.names import (
    MANIFEST,
    check_pattern,
    provenance_name,
    provenance_rank,
    record_name,
    record_rank,
)
from shardstate.parts import PartFile, part_file
from shardstate.plan import Plan, padding_boxes, plan_identity
from shardstate.provenance import parse_provenance, provenance_json
from shardstate.storage import Output, Storage, Writable
from shardstate.targets import DigestTarget, FilesTarget

# Carries out a plan for some of its rows; writes files, or hashes tensors.
Carry = Callable[[Plan, Storage, "FilesTarget | DigestTarget", frozenset[int] | None], None]
# A rank's plan as sharding the source anew would make it, and its aliases.
Replan = Callable[[int], tuple[Plan, Sequence[tuple[str, ...]]]]


@dataclass
class Repair:
    """One repair: what it has, what it made, and why it could not make the rest."""

    target: Writable
    donor: Checkpoint
    carry: Carry
    replan: Replan
    made: dict[str, int] = field(default_factory=dict)  # file → bytes
    failed: dict[str, str] = field(default_factory=dict)  # file → why

    @property
    def from_copy(self) -> bool:
        """Whether the donor is another copy of the set; else it is the source."""
        return self.donor.kind == "shardstate"

    def small_files(self, found: Verification) -> None:
        """Make records, provenances and companions again that `found` calls damaged."""
        damaged = {problem.file for problem in found.problems}
        manifest = found.manifest
        if manifest is None:
            return  # nothing says what they should be
        entries = {entry.name: entry for entry in manifest.files}
        # A record may need the provenance of its rank.
        for name in sorted(damaged, key=lambda name: (record_rank(name) is not None, name)):
            entry = entries.get(name)
            if entry is None or name in self.made or name.endswith(".safetensors"):
                continue
            with self._trying(name):
                self._put(name, self._small(entry, manifest, found))

    def rank_files(self, found: Verification) -> None:
        """Make rank files again that `found` calls damaged; records and provenance are sound."""
        damaged = {problem.file for problem in found.problems}
        for rank, record in found.records.items():
            parts = [i for i, entry in enumerate(record.files) if entry.name in damaged]
            if not parts:
                continue
            try:
                self._remake(record, rank, parts)
            except (InputError, _CannotBeMade) as error:
                names = [record.files[part].name for part in parts]
                self.failed |= {name: str(error) for name in names if name not in self.made}

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """Note why a file could not be made, and go on with others; storage errors end it all."""
        try:
            yield
        except (InputError, _CannotBeMade) as error:
            self.failed[name] = str(error)

    def _put(self, name: str, data: bytes) -> None:
        self.target.put(name, data)
        self.made[name] = len(data)

    # Small files

    def _small(self, entry: FileEntry, manifest: Manifest, found: Verification) -> bytes:
        """Return the bytes of a file as the manifest lists it, wherever they can be had."""
        for data in self._candidates(entry, manifest, found):
            if len(data) == entry.bytes and digest_of(data) == entry.digest:
                return data
        raise _CannotBeMade(
            f"what {self.donor.location} gives has another digest; name "
            f"{'a sound copy' if self.from_copy else 'another copy of the set'} (--repair COPY)"
        )

    def _candidates(
        self, entry: FileEntry, manifest: Manifest, found: Verification
    ) -> Iterator[bytes]:
        rank = record_rank(entry.name)
        provenance = provenance_rank(entry.name)
        if self.from_copy or (rank is None and provenance is None):
            with contextlib.suppress(InputError):
                yield self.donor.storage.read(entry.name, limit=entry.bytes)
        if self.from_copy:
            return
        if provenance is not None:
            plan, _ = self.replan(provenance)
            yield provenance_json(plan, set_id=manifest.set, rank=provenance)
        elif rank is not None:
            yield from self._records(rank, manifest, found)

    def _records(self, rank: int, manifest: Manifest, found: Verification) -> Iterator[bytes]:
        """Yield what the record of `rank` may have been: its rank files tell most of it."""
        files = self._part_entries(rank, manifest)
        entries = {entry.name: entry for entry in manifest.files}
        listed = entries.get(provenance_name(rank))
        sealed = None if listed is None else Sealed(listed.bytes, listed.digest)
        aliases: list[Sequence[tuple[str, ...]]] = [()]
        padding: dict[str, list[list[tuple[int, int]]]] = {}
        if listed is not None:
            plan, own = self.replan(rank)
            aliases.insert(0, own)
            boxes = padding_boxes(plan.fills, plan.tensors)
            padding = {k: [[(b, e) for b, e in box] for box in v] for k, v in boxes.items()}
        aliases += [record.aliases for record in found.records.values()]
        small = {
            name: SmallFile(name, entry.bytes, entry.digest)
            for name, entry in entries.items()
            if entry.rank is None
        }
        orders = [record.companions for record in found.records.values()]
        with contextlib.suppress(KeyError):
            orders.append(tuple(small[name] for name in companions_of(self.donor.storage)))
        orders.append(tuple(small.values()))
        for companions in orders:
            for groups in aliases:
                yield record_json(
                    Record(
                        set=manifest.set,
                        rank=rank,
                        info=manifest.info,
                        files=files,
                        aliases=tuple(groups),
                        padding={
                            k: [[(b, e) for b, e in x] for x in v] for k, v in padding.items()
                        },
                        provenance=sealed,
                        companions=companions,
                    )
                )

    def _part_entries(self, rank: int, manifest: Manifest) -> tuple[PartEntry, ...]:
        """Return the rank files of a rank as its record lists them, hashed anew."""
        pattern = check_pattern(manifest.info.pattern, manifest.info.shape)
        listed = {
            place[1]: entry
            for entry in manifest.files
            if entry.rank == rank and (place := pattern.parse(entry.name)) is not None
        }
        found = []
        for _, entry in sorted(listed.items()):
            size, header, raw = read_header(self.target, entry.name)
            catalog = catalog_of([(entry.name, size, header)], weight_map=None)
            target = DigestTarget([catalog])
            self.carry(plan_identity(catalog), self.target, target, None)
            blocks = tuple(target.blocks(0, row) for row in range(len(catalog)))
            own = digest_of(raw)
            if size != entry.bytes or rank_file_digest(own, blocks) != entry.digest:
                raise _CannotBeMade(f"{entry.name} is damaged too: name another copy of the set")
            found.append(PartEntry(entry.name, size, own, entry.digest, blocks))
        return tuple(found)

    def _own(self, name: str) -> bytes:
        return self.target.read(name, limit=MAX_JSON_BYTES)

    # Rank files

    def _remake(self, record: Record, rank: int, parts: Sequence[int]) -> None:
        plan, storage, files = (self._from_copy if self.from_copy else self._from_source)(
            record, rank, parts
        )
        held = _Held(self.target)

        def finished(part: PartFile, entry: PartEntry) -> None:
            output = held.outputs[part.name]
            if entry != record.files[part.part]:
                whose = "that copy is damaged too" if self.from_copy else "the source has changed"
                self.failed[part.name] = f"what {self.donor.location} gives differs: {whose}"
                return
            output.publish()
            self.made[part.name] = part.nbytes

        rows = frozenset(row for part in files for row in part.rows)
        try:
            with FilesTarget(cast(Writable, held), [files], finished) as target:
                self.carry(plan, storage, target, rows)
        finally:
            for output in held.outputs.values():
                output.discard()

    def _from_copy(
        self, record: Record, rank: int, parts: Sequence[int]
    ) -> tuple[Plan, Storage, list[PartFile]]:
        """Return the plan that copies rank files, and the files."""
        if self.donor.record(rank) != record:
            raise _CannotBeMade(f"{self.donor.location} is no copy of this set")
        catalogs, files, first = [], [], 0
        for part in parts:
            entry = record.files[part]
            header = self.donor.part_header(entry, record, part)
            raw = bytearray(header.data_begin)
            self.donor.storage.read_into(entry.name, 0, [memoryview(raw)])
            catalogs.append(catalog_of([(entry.name, entry.bytes, header)], weight_map=None))
            count = len(header.names)
            rows = tuple(range(first, first + count))
            files.append(
                PartFile(entry.name, rank, part, bytes(raw), rows, header.begins, entry.bytes)
            )
            first += count
        return plan_identity(merge_catalogs(catalogs)), self.donor.storage, files

    def _from_source(
        self, record: Record, rank: int, parts: Sequence[int]
    ) -> tuple[Plan, Storage, list[PartFile]]:
        """Return the plan that makes rank files from the source, and the files."""
        name = provenance_name(rank)
        if record.provenance is None:
            raise _CannotBeMade("no provenance is recorded: name another copy (--repair COPY)")
        plan = parse_provenance(self._own(name), file=name, set_id=record.set, rank=rank)
        assert self.donor.catalog is not None
        rebased, absent = rebased_plan(plan, self.donor.catalog)
        if absent:
            raise _CannotBeMade(f"{self.donor.location} holds no {min(absent)} like that")
        pattern = check_pattern(record.info.pattern, record.info.shape)
        ends = np.cumsum([len(entry.blocks) for entry in record.files]).tolist()
        if ends[-1] != len(plan.tensors):
            raise _CannotBeMade(f"{name} names {len(plan.tensors)} tensors, not {ends[-1]}")
        files = []
        for part in parts:
            rows = range(ends[part] - len(record.files[part].blocks), ends[part])
            if opaque := [row for row in rows if row in plan.opaque]:
                lost, how = plan.tensors.names[opaque[0]], plan.opaque[opaque[0]]
                raise _CannotBeMade(
                    f"{lost} was computed ({how}), not copied: name another copy (--repair COPY)"
                )
            files.append(
                part_file(
                    plan.tensors,
                    rows,
                    rank=rank,
                    part=part,
                    set_id=record.set,
                    name=pattern.name(rank, part),
                )
            )
        return rebased, self.donor.storage, files


class _CannotBeMade(ShardStateError):
    """Why one file stays as it is; it ends up in a note."""


class _Held:
    """Creates outputs that are published by hand, once their digests were compared."""

    def __init__(self, storage: Writable) -> None:
        self._storage = storage
        self.outputs: dict[str, Output] = {}

    def create(self, name: str, nbytes: int) -> Output:
        self.outputs[name] = self._storage.create(name, nbytes)
        return _HeldOutput(self.outputs[name])


@dataclass
class _HeldOutput:
    """An output whose `publish` waits."""

    output: Output

    def write(self, begin: int, views: Sequence[memoryview]) -> None:
        self.output.write(begin, views)

    def stop(self) -> None:
        self.output.stop()

    def publish(self) -> None:
        """Do nothing yet."""

    def discard(self) -> None:
        """Do nothing: whoever holds the outputs discards what was not published."""


def remake_manifest(
    target: Writable, copy: Callable[[], Checkpoint] | None
) -> tuple[int, tuple[str, ...]]:
    """Make a manifest that is lost or damaged again; return the bytes written, and notes.

    From the records of all ranks, as whoever wrote the set did; where these do not suffice, it is
    that of another copy. Where neither will do a note says why, or `SetError` if there is none.
    """
    with contextlib.suppress(InputError):
        parse_manifest(target.read(MANIFEST, limit=MAX_JSON_BYTES), file=MANIFEST)
        return 0, ()
    found = look(target)
    try:
        made = _publish_from_records(target, found)
        return len(manifest_json(made)), (f"{MANIFEST} was made again from the records",)
    except SetError as error:
        why = str(error).removeprefix(f"{target.location}: ")
        why += ", or name another copy of the set (--repair COPY)"
    if copy is not None:
        with copy() as donor:
            if donor.manifest is not None:
                listed = {entry.name: entry.digest for entry in donor.manifest.files}
                held = {record_name(r): digest_of(data) for r, (_, data) in found.records.items()}
                if held and held.items() <= listed.items():
                    target.put(MANIFEST, donor.manifest_bytes)
                    note = f"{MANIFEST} was made again from {donor.location}"
                    return len(donor.manifest_bytes), (note,)
                why = f"{donor.location} is no copy of this set"
    if MANIFEST not in target.entries():
        raise SetError(
            f"{target.location}: {MANIFEST} is missing and cannot be made again: {why}",
            file=MANIFEST,
        )
    return 0, (f"{MANIFEST} was not made again: {why}",)


def _publish_from_records(target: Writable, found: Found) -> Manifest:
    """Publish the manifest of the only set whose records are there; `SetError` says what lacks."""
    records = [record for record, _ in found.records.values()]
    if (sets := len({(record.set, record.info.topology) for record in records})) != 1:
        raise SetError(f"the sound records are of {sets} sets, expected one; write all ranks again")
    world = records[0].info.shape.world
    made = publish_manifest(target, found, set_id=records[0].set, world=world)
    if isinstance(made, tuple):
        raise SetError(f"{record_name(made[0])} is missing; write that rank again")
    return made


def apply(
    repair: Repair, found: Verification, check: Callable[[bool], Verification]
) -> Verification:
    """Repair what `found`, with all data hashed, says is wrong; return what is wrong afterwards.

    `check` verifies the set again, its data too where asked.
    """
    deep = found
    for _ in range(2):  # records and provenances, then what only they show
        before = len(repair.made)
        repair.small_files(found)
        if len(repair.made) == before:
            break
        found = check(False)
    if repair.made:
        deep = check(True)
    repair.rank_files(deep)
    if not repair.made:
        return deep
    after = check(False)
    known = {(p.file, p.kind) for p in after.problems}
    after.problems += [
        p for p in deep.problems if p.file not in repair.made and (p.file, p.kind) not in known
    ]
    return after
