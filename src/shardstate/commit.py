"""Writes a set: what may be replaced, what is finished already, and the order that keeps it whole.

The order, each step synced: remove the manifest; remove the rank's record and provenance; write
parts under temporary names and rename; remove the rank's other old parts; companions; provenance;
record; manifest when all records are there. See `docs/format.md`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set

from shardstate.digest import digest_of
from shardstate.errors import (
    InputError,
    SetError,
    StorageError,
    UsageError,
)
from shardstate.inventory import Examiner, Found, Identity, look
from shardstate.manifest import (
    MAX_JSON_BYTES,
    VERSION,
    Manifest,
    PartEntry,
    Record,
    Sealed,
    SetInfo,
    SmallFile,
    manifest_json,
    manifest_of,
    parse_manifest,
    parse_record,
    record_json,
    seal,
)
from shardstate.names import (
    COMPANION_BYTES,
    MANIFEST,
    OURS,
    REPLACING,
    SIGNATURE,
    check_pattern,
    is_companion,
    is_relative_path,
    note_name,
    provenance_name,
    record_name,
    record_rank,
    temporary_name,
)
from shardstate.parts import PartFile
from shardstate.plan import Plan
from shardstate.provenance import provenance_json
from shardstate.storage import Storage, Writable

_log = logging.getLogger("shardstate")

_MANY_PARTS = 4096  # temporary files of more parts than that are left to `shard --force`


class SetWriter:
    """Writes ranks of one set into a storage that the caller has locked."""

    def __init__(
        self,
        storage: Writable,
        *,
        set_id: str,
        info: SetInfo,
        companions: Sequence[tuple[Storage, str]],
        source_identity: Identity,
    ) -> None:
        self._storage = storage
        self._set = set_id
        self._info = info
        self._pattern = check_pattern(info.pattern, info.shape)
        self._companions = companions
        self._identity = source_identity
        self._examiner = Examiner(storage, set_id, self._pattern, companions, source_identity)
        self._old_files: set[str] = set()
        self._replaced: set[str] = set()  # rank files of this rank's save before
        self._small: tuple[SmallFile, ...] | None = None  # the companions, once they are there

    def begin(
        self, parts: Mapping[int, Sequence[PartFile]], *, force: bool
    ) -> dict[int, dict[int, PartEntry]] | None:
        """Prepare the target for `parts`, by rank; return the finished ones by rank and number.

        None where every rank is complete and the set committed: nothing is left to do. Raises
        `TargetError` where the target holds anything that must not be replaced; then, and where
        the disk lacks space, nothing was changed.
        """
        found = look(self._storage)
        self._examiner.check(found, force=force)
        if not force and (done := self._examiner.complete(found, parts)):
            parts = {rank: each for rank, each in parts.items() if rank not in done}
            if not parts and found.manifest is not None:
                self._clean(set())
                return None
        kept = {} if force else self._examiner.kept_parts(found, parts)
        keep = {note_name(rank, part) for rank, each in kept.items() for part in each}
        self._clean({REPLACING, *keep})  # what a killed run left takes space that this one needs
        needed = sum(
            part.nbytes
            for rank, each in parts.items()
            for part in each
            if part.part not in kept.get(rank, {})
        )
        free = self._storage.free_bytes()
        if free is not None and needed > free:
            raise StorageError(
                f"{self._storage.location}: {needed} bytes are to be written and {free} are free; "
                f"free some space or choose another place"
            )
        self._old_files = set(found.listed)
        if force:
            self._old_files |= {name for name in found.entries if self._examiner.is_of_a_set(name)}
        if self._old_files:
            # Without manifest and records nothing else would say that these files belong here.
            files = tuple(sorted(self._old_files))
            content = {"version": VERSION, "set": self._set, "files": files}
            self._storage.put(REPLACING, seal(content))
        for name in (MANIFEST, SIGNATURE):
            self._storage.remove(name)
        self._storage.sync()
        for rank in parts:
            self._storage.remove(provenance_name(rank))
            self._storage.remove(record_name(rank))
        self._storage.sync()
        return {rank: kept.get(rank, {}) for rank in parts}

    def begin_rank(self, rank: int) -> None:
        """Prepare one rank's save, while others save theirs; `UsageError` if it is there."""
        storage, name = self._storage, record_name(rank)
        try:
            there = parse_record(storage.read(name, limit=MAX_JSON_BYTES), file=name, rank=rank)
        except InputError:
            there = None  # none, or a damaged one: about to be replaced either way
        if there is not None and there.set == self._set:
            raise UsageError(
                f"{storage.location}: save {self._set} of rank {rank} is there already; "
                f"each save needs a new save_id"
            )
        if there is not None:
            self._replaced = {entry.name for entry in there.files}
        for file in (MANIFEST, SIGNATURE):
            storage.remove(file)
        storage.sync()
        storage.remove(provenance_name(rank))
        storage.remove(name)
        storage.sync()
        own = {temporary_name(self._pattern.name(rank, part)) for part in range(_MANY_PARTS)}
        for file in storage.entries():
            if file in own:
                storage.remove(file)

    def note(self, part: PartFile, entry: PartEntry) -> None:
        """Remember that a part is finished, for a run that takes this one up."""
        content = {
            "version": VERSION,
            "set": self._set,
            "source": self._identity,
            "file": entry,
        }
        self._storage.put(note_name(part.rank, part.part), seal(content))

    def finish_rank(
        self,
        rank: int,
        files: Sequence[PartEntry],
        *,
        padding: Mapping[str, list[list[list[int]]]],
        provenance: Plan | None,
        aliases: Sequence[tuple[str, ...]] = (),
    ) -> Record:
        """Commit one rank, whose parts are all published; `provenance` is the plan that made it."""
        storage = self._storage
        own = {entry.name for entry in files}
        old = {name for name in storage.entries() if self._rank_of(name) == rank}
        for name in sorted((old | self._replaced) - own):
            storage.remove(name)
        if self._small is None:
            self._small = tuple(self._put_companion(*each) for each in self._companions)
        sealed = None
        if provenance is not None:
            data = provenance_json(provenance, set_id=self._set, rank=rank)
            storage.put(provenance_name(rank), data)
            sealed = Sealed(len(data), digest_of(data))
        record = Record(
            set=self._set,
            rank=rank,
            info=self._info,
            files=tuple(files),
            aliases=tuple(aliases),
            padding={k: [[(b, e) for b, e in box] for box in v] for k, v in padding.items()},
            provenance=sealed,
            companions=self._small,
        )
        storage.put(record_name(rank), record_json(record))
        for part in range(len(files)):
            storage.remove(note_name(rank, part))
        return record

    def commit(self, *, shared: bool = False) -> tuple[int, ...]:
        """Publish the manifest if all ranks are there; return the ranks that still lack.

        Afterwards what only the replaced set listed is removed; where others write too (`shared`),
        only its rank files.
        """
        found = look(self._storage)
        world = self._info.shape.world
        manifest = publish_manifest(self._storage, found, set_id=self._set, world=world)
        if isinstance(manifest, tuple):
            return manifest
        listed = {entry.name for entry in manifest.files}
        beyond = {name for name in found.entries if self._rank_of(name) >= world}
        for name in sorted((found.listed | self._old_files | beyond) - listed):
            if not shared or self._examiner.mark(name) is not None:
                self._storage.remove(name)
        # Records of ranks that this set does not have: another set's, whole or damaged.
        damaged = {r for name in found.unreadable if (r := record_rank(name)) is not None}
        for rank in (found.records.keys() | damaged) - set(range(world)):
            self._storage.remove(provenance_name(rank))
            self._storage.remove(record_name(rank))
        self._storage.sync()
        if not shared:
            self._clean(set())
        return ()

    def _rank_of(self, name: str) -> int:
        """Return the rank whose file has this name; -1 for any other file."""
        place = self._pattern.parse(name)
        return -1 if place is None else place[0]

    def _clean(self, keep: Set[str]) -> None:
        """Remove what an interrupted run left under temporary names, but for `keep`."""
        names = [*self._storage.strays(), *(entry.name for entry in self._storage.walk())]
        for name in names:
            if name.rsplit("/", 1)[-1].startswith(OURS) and name not in keep:
                self._storage.remove(name)
        self._storage.sync()

    def _put_companion(self, source: Storage, name: str) -> SmallFile:
        data = source.read(name, limit=COMPANION_BYTES)
        entry = SmallFile(name, len(data), digest_of(data))
        with contextlib.suppress(InputError):
            if (
                self._storage.size(name) == len(data)
                and self._storage.read(name, limit=COMPANION_BYTES) == data
            ):
                return entry
        self._storage.put(name, data)
        return entry


def publish_manifest(
    storage: Writable, found: Found, *, set_id: str, world: int
) -> Manifest | tuple[int, ...]:
    """Publish the manifest of a set if the records of all ranks are there.

    Return it, else the ranks that lack. `SetError` where one is damaged, or they disagree.
    """
    ours = {r: each for r, each in found.records.items() if each[0].set == set_id}
    lacking = tuple(rank for rank in range(world) if rank not in ours)
    if bad := [name for name in found.unreadable if record_rank(name) in lacking]:
        raise SetError(
            f"{storage.location}: {bad[0]} is damaged; write that rank again", file=bad[0]
        )
    if lacking:
        return lacking
    manifest = manifest_of([ours[rank] for rank in range(world)])
    data = manifest_json(manifest)
    parse_manifest(data, file=MANIFEST)  # records can contradict each other in names
    storage.put(MANIFEST, data)
    storage.sync()
    return manifest


def companions_of(storage: Storage) -> Iterator[str]:
    """Yield the small files of a source that come along with a set, by relative path."""
    for entry in storage.walk(is_companion):
        if not is_companion(entry.name):
            continue
        if not is_relative_path(entry.name):
            _log.warning(
                "shardstate: %r has a name that a record cannot hold; it stays behind", entry.name
            )
            continue
        if entry.nbytes > COMPANION_BYTES:
            _log.warning(
                "shardstate: %s has %d bytes, more than the %d of a companion; it stays behind",
                entry.name,
                entry.nbytes,
                COMPANION_BYTES,
            )
            continue
        yield entry.name
