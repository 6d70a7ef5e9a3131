"""What lies where a set is to be written: what may be replaced, what is finished already."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from shardstate.checkpoint import mark_of, read_header, read_header_bytes
from shardstate.digest import digest_of
from shardstate.errors import (
    InputError,
    PathNotFound,
    SetError,
    TargetError,
)
from shardstate.manifest import (
    MAX_JSON_BYTES,
    Manifest,
    PartEntry,
    Record,
    check_names,
    decode,
    parse_manifest,
    parse_record,
    unseal,
)
from shardstate.names import (
    COMPANION_BYTES,
    MANIFEST,
    OURS,
    REPLACING,
    SIGNATURE,
    Pattern,
    default_pattern,
    note_name,
    note_place,
    provenance_name,
    provenance_rank,
    record_name,
    record_rank,
)
from shardstate.parts import PartFile
from shardstate.sharding import Topology
from shardstate.storage import Entry, Storage, Writable

_log = logging.getLogger("shardstate")

_DEFAULT_PATTERNS = [
    Pattern(default_pattern(Topology(1, pp, dp))) for pp in (1, 2) for dp in (1, 2)
]
Identity = tuple[tuple[int | str, ...], ...]  # of each source file, by name


class Note(msgspec.Struct):
    """`.shardstate-part-{R}-{part}`: a part is finished, and what it was made from."""

    set: str
    source: tuple[tuple[int | str, ...], ...]
    file: PartEntry


class Replacing(msgspec.Struct):
    """`.shardstate-replacing`: what the set that is being replaced consists of."""

    set: str  # that replaces it
    files: tuple[str, ...]


@dataclass
class Found:
    """What lies at the target before anything is written."""

    entries: dict[str, Entry]
    strays: list[str]  # links that lead nowhere, pipes, …
    manifest: Manifest | None = None
    records: dict[int, tuple[Record, bytes]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # manifest or records that are damaged
    listed: set[str] = field(default_factory=set)  # what manifest and records list, or listed
    notes: dict[str, Note] = field(default_factory=dict)  # sound ones
    replacing: Replacing | None = None

    @property
    def ids(self) -> set[str]:
        found = {record.set for record, _ in self.records.values()}
        found |= {self.manifest.set} if self.manifest else set()
        return found | ({self.replacing.set} if self.replacing else set())

    def begun(self, set_id: str) -> bool:
        """Whether a run that wrote this set was here."""
        return set_id in self.ids or any(note.set == set_id for note in self.notes.values())


def look(storage: Writable) -> Found:
    """Read manifest, records and notes; damaged ones are listed, or passed over with a warning."""
    found = Found({entry.name: entry for entry in storage.walk()}, storage.strays())
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
                found.replacing = decode(unseal(data, file=name), Replacing, file=name)
                check_names(found.replacing.files, file=name, folders=True)
                found.listed |= set(found.replacing.files)
            elif rank is not None:
                record = parse_record(data, file=name, rank=rank)
                found.records[rank] = record, data
                found.listed |= {f.name for f in record.files}
                found.listed |= {c.name for c in record.companions}
                found.listed |= {name, provenance_name(rank)}
            else:
                found.notes[name] = decode(unseal(data, file=name), Note, file=name)
        except SetError as error:
            if name == MANIFEST or rank is not None:
                found.unreadable.append(name)
            else:
                _log.warning("shardstate: %s; what it says is not used", error)
    return found


@dataclass(frozen=True)
class Examiner:
    """Judges what lies at a target by the set that is to be written there."""

    storage: Writable
    set_id: str
    pattern: Pattern
    companions: Sequence[tuple[Storage, str]]
    identity: Identity  # of the source's files

    def check(self, found: Found, *, force: bool) -> None:
        """Raise `TargetError` unless all that lies there may be replaced or taken up."""
        location = self.storage.location
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
        if others := found.ids - {self.set_id}:
            infos = [record.info for record, _ in found.records.values()]
            infos += [found.manifest.info] if found.manifest else []
            what = f" for tp {infos[-1].topology.tp}" if infos else ""
            raise TargetError(
                f"{location}: holds set {min(others)}{what}, expected {self.set_id} or none; "
                f"choose an empty directory, or --force replaces it"
            )
        noted = {note.file.name for note in found.notes.values() if note.set == self.set_id}
        strangers = [
            name
            for name in found.entries
            if self._is_rank_file(name)
            and name not in found.listed | noted
            and self.mark(name) != self.set_id
        ]
        if strangers:
            raise TargetError(
                f"{location}: {strangers[0]} is of another set; "
                f"choose an empty directory, or --force replaces it",
                file=strangers[0],
            )

    def _belongs(self, name: str, found: Found) -> bool:
        """Whether a file at the target is part of a set, whichever."""
        return (
            name in (MANIFEST, SIGNATURE)
            or name in found.listed
            or name.rsplit("/", 1)[-1].startswith(OURS)
            or record_rank(name) is not None
            or provenance_rank(name) is not None
            or self.is_of_a_set(name)
            or self._is_our_companion(name, found)
        )

    def _is_rank_file(self, name: str) -> bool:
        known = (self.pattern, *_DEFAULT_PATTERNS)
        return any(pattern.fields(name) is not None for pattern in known)

    def is_of_a_set(self, name: str) -> bool:
        """Whether a file has the name of a rank file, or the mark of one."""
        return self._is_rank_file(name) or self.mark(name) is not None

    def _is_our_companion(self, name: str, found: Found) -> bool:
        """Whether a file is what an interrupted run of this set brought along."""
        for source, companion in self.companions:
            if companion == name:
                if found.begun(self.set_id):
                    return True
                mine = source.read(name, limit=COMPANION_BYTES)
                return self.storage.size(name) == len(mine) and mine == self.storage.read(
                    name, limit=COMPANION_BYTES
                )
        return False

    def mark(self, name: str) -> str | None:
        """Return the set that a rank file says it is of; None for any other file."""
        if not name.endswith(".safetensors"):
            return None
        try:
            return mark_of(read_header(self.storage, name)[1])
        except InputError:
            return None

    def complete(self, found: Found, parts: Mapping[int, Sequence[PartFile]]) -> set[int]:
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
                    f"{self.storage.location}: holds this set, committed, and "
                    f"{wrong[0] if wrong else record_name(rank)} is damaged or missing; "
                    f"--force makes the set again",
                    file=wrong[0] if wrong else record_name(rank),
                )
        return done

    def _unsound(self, found: Found, record: Record) -> list[str]:
        """Return the files of a rank whose size, header or, for small ones, bytes are not right."""
        wrong = []
        small = [(c.name, c.bytes, c.digest) for c in record.companions]
        if (sealed := record.provenance) is not None:
            small.append((provenance_name(record.rank), sealed.bytes, sealed.digest))
        sizes = {name: entry.nbytes for name, entry in found.entries.items()}
        for name, nbytes, digest in small:
            if (
                sizes.get(name) != nbytes
                or digest_of(self.storage.read(name, limit=nbytes)) != digest
            ):
                wrong.append(name)
        for file in record.files:
            if sizes.get(file.name) != file.bytes:
                wrong.append(file.name)
                continue
            try:
                raw = read_header_bytes(self.storage, file.name)[1]
            except InputError:
                raw = b""
            if digest_of(raw) != file.header:
                wrong.append(file.name)
        return wrong

    def kept_parts(
        self, found: Found, parts: Mapping[int, Sequence[PartFile]]
    ) -> dict[int, dict[int, PartEntry]]:
        """Return the parts that an interrupted run finished, from the same source."""
        kept: dict[int, dict[int, PartEntry]] = {}
        for rank, each in parts.items():
            for part in each:
                note = found.notes.get(note_name(rank, part.part))
                if note is None or part.name not in found.entries:
                    continue
                try:
                    raw = read_header_bytes(self.storage, part.name)[1]
                except InputError as error:
                    _log.warning("shardstate: %s; the part is made again", error)
                    continue
                if (
                    note.set == self.set_id
                    and note.source == self.identity
                    and note.file.bytes == part.nbytes == found.entries[part.name].nbytes
                    and note.file.header == part.header_digest == digest_of(raw)
                    and note.file.name == part.name
                ):
                    kept.setdefault(rank, {})[part.part] = note.file
        return kept
