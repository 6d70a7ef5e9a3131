"""Operations that bring checkpoints from one storage to another: copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace

from shardstate.api.planning import asked_for, describe_checkpoint, open_path
from shardstate.api.writing import LOCAL_WRITE_THREADS, chosen_ranks, refuse_nested
from shardstate.catalog import INDEX_NAME
from shardstate.checkpoint import Checkpoint
from shardstate.commit import companions_of
from shardstate.digest import digest_of
from shardstate.engine import Counters, Progress, execute
from shardstate.errors import DigestError, InputError, SetError, TargetError, Unreachable
from shardstate.inventory import Examiner, Found, Replacing, look
from shardstate.manifest import MAX_JSON_BYTES, VERSION, seal
from shardstate.names import (
    COMPANION_BYTES,
    MANIFEST,
    OURS,
    REPLACING,
    SIGNATURE,
    check_pattern,
    provenance_name,
    record_name,
)
from shardstate.report import Phases, Report
from shardstate.storage import Access, Storage, Writable, writable_at
from shardstate.transfer import (
    CopyTarget,
    File,
    LookTarget,
    plain_file,
    rank_file,
    reads_of_files,
)

_FILE_TRIES = 4
_AT_ONCE = 2  # files that are open at the same time: they follow each other


@dataclass(frozen=True)
class _Small:
    """A file that is copied whole, and its digest if one is recorded."""

    name: str
    digest: str | None
    limit: int


@dataclass
class _Cargo:
    """What is to be copied, in the order in which it becomes visible."""

    files: list[File]  # large ones
    ranks: dict[int, list[_Small]] = field(default_factory=dict)  # provenance, then the record
    companions: list[_Small] = field(default_factory=list)
    last: list[_Small] = field(default_factory=list)  # manifest and signature

    @property
    def names(self) -> set[str]:
        return {file.name for file in self.files} | {small.name for small in self.small}

    @property
    def small(self) -> Iterator[_Small]:
        yield from self.companions
        for each in self.ranks.values():
            yield from each
        yield from self.last


def copy(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ranks: Sequence[int] | None = None,
    force: bool = False,
    pattern: str | None = None,
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> Report:
    """Copy a checkpoint, whatever storages it lies and goes to, and return what it took.

    Files of a set are compared with their recorded digests on the way; of what is there already,
    what matches is left alone, so that an interrupted copy goes on. Records, then the manifest,
    come last. `ranks` brings the files of some ranks, with companions and manifest. `force`
    replaces another set. Of an ordinary checkpoint come the weights and its small files; no digest
    is recorded there, so what lies at the target is compared with the source byte by byte.
    """
    phases = Phases()
    with open_path(path, pattern=pattern, access=asked_for(access, threads)) as checkpoint:
        source = checkpoint.storage
        with phases("open"):
            refuse_nested(checkpoint.location, out)
            report = describe_checkpoint(checkpoint)
            chosen = _chosen(checkpoint, ranks)
            cargo = _cargo(checkpoint, chosen)
            _describe(report, checkpoint, cargo, chosen)
        with (
            phases("write"),
            closing(writable_at(out, access or Access(), outputs=_AT_ONCE)) as target,
            target.lock(),
        ):
            workers = threads or _threads(source, target)
            found, replaced = _examined(checkpoint, target, cargo, force=force)
            carry_out = _Work(source, target, workers, progress)
            rest = carry_out.missing(cargo, found)
            if checkpoint.kind != "shardstate" and not force:
                _refuse_others(target, found, rest)
            there = set(found.entries) - _begin(checkpoint, target, chosen or (), replaced)
            counters = carry_out.files(rest)
            written = carry_out.small(cargo, there)
            _finish(target, cargo, replaced)
        report.bytes_read, report.requests = counters.bytes_read, counters.requests
        report.peak_extra_bytes = counters.peak_extra_bytes
        report.bytes_written = sum(file.nbytes for file in rest)
        if same := len(cargo.names) - len(rest) - written:
            report.notes = (f"{same} of {len(cargo.names)} files were there already",)
    return phases.finish(report, main="write")


def _threads(source: Storage, target: Storage) -> int:
    """Return how many read at once; between two stores fewer, since both sides hold memory."""
    if source.traits.remote and target.traits.remote:
        return target.traits.write_threads
    return max(LOCAL_WRITE_THREADS, source.traits.read_threads, target.traits.write_threads)


def _refuse_others(target: Writable, found: Found, rest: Sequence[File]) -> None:
    """Refuse to overwrite weights that differ: an interrupted copy leaves whole files only."""
    if other := next((file.name for file in rest if file.name in found.entries), None):
        raise TargetError(
            f"{target.location}: holds another {other} than the source; choose an empty "
            f"directory, or --force replaces it",
            file=other,
        )


def _chosen(checkpoint: Checkpoint, ranks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the ranks that come along; None for an ordinary checkpoint, which has none."""
    topology = checkpoint.topology
    if topology is None:
        if ranks is not None:
            raise InputError(
                f"{checkpoint.location}: is an ordinary checkpoint, and has no ranks; leave ranks "
                f"out, or shard it"
            )
        return None
    if checkpoint.kind == "shardstate" and checkpoint.manifest is None:
        raise SetError(
            f"{checkpoint.location}: has no {MANIFEST}: the set is incomplete; finish it first, or "
            f"make it again from the records (verify --repair)",
            file=MANIFEST,
        )
    return chosen_ranks(ranks, topology)


def _cargo(checkpoint: Checkpoint, chosen: tuple[int, ...] | None) -> _Cargo:
    storage = checkpoint.storage
    if checkpoint.catalog is not None:
        catalog = checkpoint.catalog
        sizes = zip(catalog.files, catalog.file_bytes, strict=True)
        cargo = _Cargo([plain_file(name, size) for name, size in sizes])
        if INDEX_NAME in storage.entries():
            cargo.last = [_Small(INDEX_NAME, None, MAX_JSON_BYTES)]
    elif checkpoint.kind == "vllm":
        names = [name for rank in chosen or () for name in checkpoint.parts[rank]]
        cargo = _Cargo([plain_file(name, storage.size(name)) for name in names])
    else:
        return _set_cargo(checkpoint, chosen or ())
    cargo.companions = [_Small(name, None, COMPANION_BYTES) for name in companions_of(storage)]
    return cargo


def _set_cargo(checkpoint: Checkpoint, chosen: tuple[int, ...]) -> _Cargo:
    manifest = checkpoint.manifest
    assert manifest is not None
    cargo = _Cargo([])
    digests = {entry.name: entry.digest for entry in manifest.files}
    for rank in chosen:
        record = checkpoint.record(rank)
        for part, entry in enumerate(record.files):
            cargo.files.append(rank_file(entry, checkpoint.part_header(entry, record, part)))
        small = []
        if record.provenance is not None:
            name = provenance_name(rank)
            small.append(_Small(name, record.provenance.digest, MAX_JSON_BYTES))
        name = record_name(rank)
        cargo.ranks[rank] = [*small, _Small(name, digests[name], MAX_JSON_BYTES)]
    cargo.companions = [
        _Small(entry.name, entry.digest, COMPANION_BYTES)
        for entry in manifest.files
        if entry.rank is None
    ]
    cargo.last = [_Small(MANIFEST, None, MAX_JSON_BYTES)]
    if SIGNATURE in checkpoint.storage.entries():
        cargo.last.insert(0, _Small(SIGNATURE, None, MAX_JSON_BYTES))
    return cargo


def _describe(
    report: Report, checkpoint: Checkpoint, cargo: _Cargo, chosen: tuple[int, ...] | None
) -> None:
    if chosen is None:
        assert checkpoint.catalog is not None
        catalogs = [checkpoint.catalog]
    else:
        catalogs = [checkpoint.rank_catalog(rank) for rank in chosen]
    report.bytes = sum(each.nbytes(row) for each in catalogs for row in range(len(each)))
    report.tensors = sum(len(each) for each in catalogs)
    report.ranks = chosen
    report.bytes_wanted = sum(file.nbytes for file in cargo.files)
    report.bytes_meta = checkpoint.bytes_meta
    rank_of = {}
    if checkpoint.manifest is not None:
        rank_of = {entry.name: entry.rank for entry in checkpoint.manifest.files}
    report.file_list = tuple(
        {"name": file.name, "bytes": file.nbytes, "rank": rank_of.get(file.name)}
        for file in cargo.files
    )
    report.files = len(cargo.names)


def _examined(
    checkpoint: Checkpoint, target: Writable, cargo: _Cargo, *, force: bool
) -> tuple[Found, set[str]]:
    """Return what lies at the target, and what of it is to be replaced by this set."""
    found = look(target)
    if checkpoint.kind != "shardstate":
        others = [
            name
            for name in (*found.entries, *found.strays)
            if name not in cargo.names and not name.rsplit("/", 1)[-1].startswith(OURS)
        ]
        if others:
            raise TargetError(
                f"{target.location}: holds files that the source has not: "
                f"{', '.join(others[:20])}; choose an empty directory, or move them away",
                file=others[0],
            )
        return found, set()
    manifest = checkpoint.manifest
    assert manifest is not None
    source, pattern = checkpoint.storage, check_pattern(manifest.info.pattern, manifest.info.shape)
    companions = [(source, small.name) for small in cargo.companions]
    examiner = Examiner(target, manifest.set, pattern, companions, ())
    examiner.check(found, force=force)
    if found.ids <= {manifest.set} and not found.unreadable and found.replacing is None:
        return found, set()
    listed = {entry.name for entry in manifest.files}
    marked = {name for name in found.entries if examiner.is_of_a_set(name)}
    return found, (found.listed | marked | {REPLACING, SIGNATURE}) - listed | {MANIFEST}


def _begin(
    checkpoint: Checkpoint, target: Writable, chosen: tuple[int, ...], replaced: set[str]
) -> set[str]:
    """Take another set's manifest away, and its records, before anything of it is replaced.

    Return the names of what was removed.
    """
    if not replaced:
        return set()
    files = tuple(sorted(replaced - {REPLACING, MANIFEST, SIGNATURE}))
    note = Replacing(str(checkpoint.set_id), files)
    target.put(REPLACING, seal({"version": VERSION, "set": note.set, "files": note.files}))
    for name in (MANIFEST, SIGNATURE):
        target.remove(name)
    target.sync()
    own = {make(rank) for rank in chosen for make in (provenance_name, record_name)}
    for name in sorted(own):
        target.remove(name)
    target.sync()
    return {MANIFEST, SIGNATURE, *own}


def _finish(target: Writable, cargo: _Cargo, replaced: set[str]) -> None:
    """Remove what only the replaced set had, and what interrupted runs left."""
    left = {name for name in replaced if name not in cargo.names}
    for entry in list(target.walk()):
        if entry.name in left or entry.name.rsplit("/", 1)[-1].startswith(OURS):
            target.remove(entry.name)
    target.sync()


@dataclass(frozen=True)
class _Work:
    """The passes of one copy."""

    source: Storage
    target: Writable
    threads: int
    progress: Progress | None

    def missing(self, cargo: _Cargo, found: Found) -> list[File]:
        """Return the large files that are not at the target as they should be."""
        sizes = {name: entry.nbytes for name, entry in found.entries.items()}
        there = [file for file in cargo.files if sizes.get(file.name) == file.nbytes]
        look = LookTarget(self.target, there, self.source)
        self._execute(there, self.target, look, None)
        same = {file.name for file in there} - look.wrong
        return [file for file in cargo.files if file.name not in same]

    def files(self, files: Sequence[File]) -> Counters:
        """Copy large files; those whose upload broke off, which only a new one can mend, again."""
        done: set[str] = set()
        left = list(files)
        for tries_left in reversed(range(_FILE_TRIES)):
            try:
                with CopyTarget(self.source, left, self.target, done.add) as into:
                    counters = self._execute(left, self.source, into, self.progress)
                return replace(counters, bytes_read=sum(file.nbytes for file in files))
            except Unreachable:
                if not tries_left:
                    raise
                for storage in (self.source, self.target):
                    storage.interrupt(False)
                left = [file for file in left if file.name not in done]
        raise AssertionError("the last try returns or raises")

    def small(self, cargo: _Cargo, there: Set[str]) -> int:
        """Copy the small files that differ from those there, in order; return how many."""
        return sum(self._put(small, there) for small in cargo.small)

    def _put(self, small: _Small, there: Set[str]) -> bool:
        if small.name in there and small.digest is not None:
            data = self.target.read(small.name, limit=small.limit)
            if digest_of(data) == small.digest:
                return False
        data = self.source.read(small.name, limit=small.limit)
        if small.digest is not None and digest_of(data) != small.digest:
            raise DigestError(
                f"{self.source.location}/{small.name}: has digest {digest_of(data)}, expected "
                f"{small.digest}; the source is damaged: verify it, or copy from another place",
                file=small.name,
            )
        if small.name in there and self.target.read(small.name, limit=small.limit) == data:
            return False
        self.target.put(small.name, data)
        return True

    def _execute(
        self,
        files: Sequence[File],
        storage: Storage,
        target: CopyTarget | LookTarget,
        progress: Callable[[int, int], None] | None,
    ) -> Counters:
        return execute(
            reads_of_files(files),
            storage=storage,
            target=target,
            threads=self.threads,
            progress=progress,
            fills_memory=False,
        )
