"""Writes a set: what may be replaced, what is finished already, and the order that keeps it whole.

The order, each step synced: remove the manifest; remove the rank's record and provenance; write
parts under temporary names and rename; remove the rank's other old parts; companions; provenance;
record; manifest when all records are there. See `docs/format.md`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import msgspec

from shardstate.checkpoint import mark_of, read_header, read_header_bytes
from shardstate.digest import digest_of
from shardstate.errors import (
    InputError,
    PathNotFound,
    SetError,
    StorageError,
    TargetError,
    UsageError,
)
from shardstate.manifest import (
    MAX_JSON_BYTES,
    VERSION,
    Manifest,
    PartEntry,
    Record,
    Sealed,
    SetInfo,
    SmallFile,
    check_names,
    decode,
    manifest_json,
    manifest_of,
    parse_manifest,
    parse_record,
    record_json,
    seal,
    unseal,
)
from shardstate.names import (
    COMPANION_BYTES,
    DEFAULT_PATTERN,
    MANIFEST,
    OURS,
    PIPELINE_PATTERN,
    REPLACING,
    SIGNATURE,
    Pattern,
    check_pattern,
    is_companion,
    is_relative_path,
    note_name,
    note_place,
    provenance_name,
    provenance_rank,
    record_name,
    record_rank,
    temporary_name,
)
from shardstate.parts import PartFile
from shardstate.plan import Plan
from shardstate.provenance import provenance_json
from shardstate.storage import Entry, Storage, Writable

_log = logging.getLogger("shardstate")

_MANY_PARTS = 4096  # temporary files of more parts than that are left to `shard --force`
Identity = tuple[tuple[int | str, ...], ...]  # of each source file, by name


class _Note(msgspec.Struct):
    """`.shardstate-part-{R}-{part}`: a part is finished, and what it was made from."""

    set: str
    source: tuple[tuple[int | str, ...], ...]
    file: PartEntry


class _Replacing(msgspec.Struct):
    """`.shardstate-replacing`: what the set that is being replaced consists of."""

    set: str  # that replaces it
    files: tuple[str, ...]


@dataclass
class _Found:
    """What lies at the target before anything is written."""

    entries: dict[str, Entry]
    strays: list[str]  # links that lead nowhere, pipes, …
    manifest: Manifest | None = None
    records: dict[int, tuple[Record, bytes]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # manifest or records that are damaged
    listed: set[str] = field(default_factory=set)  # what manifest and records list, or listed
    notes: dict[str, _Note] = field(default_factory=dict)  # sound ones
    replacing: _Replacing | None = None

    @property
    def ids(self) -> set[str]:
        found = {record.set for record, _ in self.records.values()}
        found |= {self.manifest.set} if self.manifest else set()
        return found | ({self.replacing.set} if self.replacing else set())

    def begun(self, set_id: str) -> bool:
        """Whether a run that wrote this set was here."""
        return set_id in self.ids or any(note.set == set_id for note in self.notes.values())


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
        self._pattern = check_pattern(info.pattern, tp=info.topology.tp, pp=info.topology.pp)
        self._companions = companions
        self._identity = source_identity
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
        found = self._look()
        self._check(found, force=force)
        if not force and (done := self._complete(found, parts)):
            parts = {rank: each for rank, each in parts.items() if rank not in done}
            if not parts and found.manifest is not None:
                self._clean(set())
                return None
        kept = {} if force else self._kept(found, parts)
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
            self._old_files |= {name for name in found.entries if self._is_of_a_set(name)}
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
        old = {
            name for name in storage.entries() if (self._pattern.parse(name) or (-1,))[0] == rank
        }
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
        found = self._look()
        world = self._info.shape.world
        ours = {r: each for r, each in found.records.items() if each[0].set == self._set}
        lacking = tuple(rank for rank in range(world) if rank not in ours)
        if lacking:
            return lacking
        if found.unreadable:
            raise SetError(
                f"{self._storage.location}: {found.unreadable[0]} is damaged; "
                f"shard again with --force",
                file=found.unreadable[0],
            )
        manifest = manifest_of([ours[rank] for rank in range(world)])
        self._storage.put(MANIFEST, manifest_json(manifest))
        self._storage.sync()
        listed = {entry.name for entry in manifest.files}
        for name in sorted((found.listed | self._old_files) - listed):
            if not shared or self._mark(name) is not None:
                self._storage.remove(name)
        for rank in found.records:
            if rank not in ours:
                self._storage.remove(provenance_name(rank))
                self._storage.remove(record_name(rank))
        self._storage.sync()
        if not shared:
            self._clean(set())
        return ()

    def _clean(self, keep: Set[str]) -> None:
        """Remove what an interrupted run left under temporary names, but for `keep`."""
        names = [*self._storage.strays(), *(entry.name for entry in self._storage.walk())]
        for name in names:
            if name.rsplit("/", 1)[-1].startswith(OURS) and name not in keep:
                self._storage.remove(name)
        self._storage.sync()

    def _look(self) -> _Found:
        storage = self._storage
        found = _Found({entry.name: entry for entry in storage.walk()}, storage.strays())
        for name in found.entries:
            rank = record_rank(name)
            if name not in (MANIFEST, REPLACING) and rank is None and note_place(name) is None:
                continue
            try:
                data = storage.read(name, limit=MAX_JSON_BYTES)
            except PathNotFound:
                continue  # whoever saves that rank is just replacing it
            try:
                if name == MANIFEST:
                    found.manifest = parse_manifest(data, file=name)
                    found.listed |= {entry.name for entry in found.manifest.files}
                elif name == REPLACING:
                    found.replacing = decode(unseal(data, file=name), _Replacing, file=name)
                    check_names(found.replacing.files, file=name, folders=True)
                    found.listed |= set(found.replacing.files)
                elif rank is not None:
                    record = parse_record(data, file=name, rank=rank)
                    found.records[rank] = record, data
                    found.listed |= {f.name for f in record.files}
                    found.listed |= {c.name for c in record.companions}
                    found.listed |= {name, provenance_name(rank)}
                else:
                    found.notes[name] = decode(unseal(data, file=name), _Note, file=name)
            except SetError as error:
                if name == MANIFEST or rank is not None:
                    found.unreadable.append(name)
                else:
                    _log.warning("shardstate: %s; what it says is not used", error)
        return found

    def _check(self, found: _Found, *, force: bool) -> None:
        """Raise `TargetError` unless all that lies there may be replaced or taken up."""
        location = self._storage.location
        foreign = [name for name in found.entries if not self._belongs(name, found)]
        foreign += [name for name in found.strays if not name.rsplit("/", 1)[-1].startswith(OURS)]
        if foreign:
            raise TargetError(
                f"{location}: holds files that belong to no set: {', '.join(foreign[:20])}"
                f"{f' and {len(foreign) - 20} more' if len(foreign) > 20 else ''}; "
                f"choose an empty directory, or move them away",
                file=foreign[0],
            )
        if force:
            return
        if found.unreadable:
            raise TargetError(
                f"{location}: {found.unreadable[0]} is damaged; --force replaces the whole set",
                file=found.unreadable[0],
            )
        if others := found.ids - {self._set}:
            infos = [record.info for record, _ in found.records.values()]
            infos += [found.manifest.info] if found.manifest else []
            what = f" for tp {infos[-1].topology.tp}" if infos else ""
            raise TargetError(
                f"{location}: holds set {min(others)}{what}, expected {self._set} or none; "
                f"choose an empty directory, or --force replaces it"
            )
        noted = {note.file.name for note in found.notes.values() if note.set == self._set}
        strangers = [
            name
            for name in found.entries
            if self._is_rank_file(name)
            and name not in found.listed | noted
            and self._mark(name) != self._set
        ]
        if strangers:
            raise TargetError(
                f"{location}: {strangers[0]} is of another set; "
                f"choose an empty directory, or --force replaces it",
                file=strangers[0],
            )

    def _belongs(self, name: str, found: _Found) -> bool:
        """Whether a file at the target is part of a set, whichever."""
        return (
            name in (MANIFEST, SIGNATURE)
            or name in found.listed
            or name.rsplit("/", 1)[-1].startswith(OURS)
            or record_rank(name) is not None
            or provenance_rank(name) is not None
            or self._is_of_a_set(name)
            or self._is_our_companion(name, found)
        )

    def _is_rank_file(self, name: str) -> bool:
        known = (self._pattern, Pattern(DEFAULT_PATTERN), Pattern(PIPELINE_PATTERN))
        return any(pattern.fields(name) is not None for pattern in known)

    def _is_of_a_set(self, name: str) -> bool:
        """Whether a file has the name of a rank file, or the mark of one."""
        return self._is_rank_file(name) or self._mark(name) is not None

    def _is_our_companion(self, name: str, found: _Found) -> bool:
        """Whether a file is what an interrupted run of this set brought along."""
        for source, companion in self._companions:
            if companion == name:
                if found.begun(self._set):
                    return True
                mine = source.read(name, limit=COMPANION_BYTES)
                return self._storage.size(name) == len(mine) and mine == self._storage.read(
                    name, limit=COMPANION_BYTES
                )
        return False

    def _mark(self, name: str) -> str | None:
        """Return the set that a rank file says it is of; None for any other file."""
        if not name.endswith(".safetensors"):
            return None
        try:
            return mark_of(read_header(self._storage, name)[1])
        except InputError:
            return None

    def _complete(self, found: _Found, parts: Mapping[int, Sequence[PartFile]]) -> set[int]:
        """Return the ranks whose record and files are there, as this run would write them."""
        done = set()
        for rank, expected in parts.items():
            if rank not in found.records:
                continue
            record = found.records[rank][0]
            same = [(f.name, f.bytes, f.header) for f in record.files] == [
                (p.name, p.nbytes, p.header_digest) for p in expected
            ]
            wrong = self._unsound(found, record)
            if not wrong and same:
                done.add(rank)
            elif found.manifest is not None:
                raise TargetError(
                    f"{self._storage.location}: holds this set, committed, and "
                    f"{wrong[0] if wrong else record_name(rank)} is damaged or missing; "
                    f"--force makes the set again",
                    file=wrong[0] if wrong else record_name(rank),
                )
        return done

    def _unsound(self, found: _Found, record: Record) -> list[str]:
        """Return the files of a rank whose size, header or, for small ones, bytes are not right."""
        wrong = []
        small = [(c.name, c.bytes, c.digest) for c in record.companions]
        if (sealed := record.provenance) is not None:
            small.append((provenance_name(record.rank), sealed.bytes, sealed.digest))
        sizes = {name: entry.nbytes for name, entry in found.entries.items()}
        for name, nbytes, digest in small:
            if (
                sizes.get(name) != nbytes
                or digest_of(self._storage.read(name, limit=nbytes)) != digest
            ):
                wrong.append(name)
        for file in record.files:
            if sizes.get(file.name) != file.bytes:
                wrong.append(file.name)
                continue
            try:
                raw = read_header_bytes(self._storage, file.name)[1]
            except InputError:
                raw = b""
            if digest_of(raw) != file.header:
                wrong.append(file.name)
        return wrong

    def _kept(
        self, found: _Found, parts: Mapping[int, Sequence[PartFile]]
    ) -> dict[int, dict[int, PartEntry]]:
        """Return the parts that an interrupted run finished, from the same source."""
        kept: dict[int, dict[int, PartEntry]] = {}
        for rank, each in parts.items():
            for part in each:
                note = found.notes.get(note_name(rank, part.part))
                if note is None or part.name not in found.entries:
                    continue
                try:
                    raw = read_header_bytes(self._storage, part.name)[1]
                except InputError as error:
                    _log.warning("shardstate: %s; the part is made again", error)
                    continue
                if (
                    note.set == self._set
                    and note.source == self._identity
                    and note.file.bytes == part.nbytes == found.entries[part.name].nbytes
                    and note.file.header == part.header_digest == digest_of(raw)
                    and note.file.name == part.name
                ):
                    kept.setdefault(rank, {})[part.part] = note.file
        return kept

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
