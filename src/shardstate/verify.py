"""Checks a checkpoint: structure, names, sizes, digests, and its bytes against their source.

All problems are collected; only what makes checking impossible is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from shardstate.against import compare_with_source
from shardstate.catalog import Catalog, catalog_of
from shardstate.checkpoint import (
    Checkpoint,
    blocks_fit,
    find_parts,
    mark_of,
    ordinary_files,
    read_header,
    refuse_unlisted,
)
from shardstate.digest import BLOCK_BYTES, digest_of, rank_file_digest
from shardstate.errors import (
    CatalogError,
    InputError,
    MisplacedError,
    PathNotFound,
    SetError,
    TruncatedFile,
    UsageError,
)
from shardstate.findings import Execute, SoundPart, Verification, remedy
from shardstate.header import Header
from shardstate.manifest import (
    MAX_JSON_BYTES,
    Manifest,
    PartEntry,
    Record,
    SetInfo,
    parse_manifest,
    parse_record,
)
from shardstate.names import (
    COMPANION_BYTES,
    MANIFEST,
    OURS,
    SIGNATURE,
    Pattern,
    provenance_name,
    record_name,
    record_rank,
)
from shardstate.plan import plan_identity
from shardstate.report import Problem
from shardstate.storage import Storage
from shardstate.targets import DigestTarget


def verify_structure(
    storage: Storage, *, pattern: str | None, ranks: Sequence[int] | None
) -> tuple[str, Verification]:
    """Check the headers of an ordinary checkpoint, or of a set that vLLM wrote; return its kind."""
    found = Verification()
    names = list(storage.entries())
    unmarked = find_parts(names, pattern)
    kind = "checkpoint" if unmarked is None else "vllm"
    files: list[tuple[str, int | None]]
    weight_map: Mapping[str, str] | None = None
    absent: Sequence[str]
    if unmarked is not None:
        absent, world = unmarked.holes, len(unmarked.parts)
        if ranks is not None and max(ranks) >= world:
            raise UsageError(f"{storage.location}: has ranks 0 to {world - 1} only")
        files = [
            (name, rank)
            for rank, own in unmarked.parts.items()
            for name in own
            if ranks is None or rank in ranks
        ]
    else:
        if ranks is not None:
            raise UsageError(f"{storage.location}: is an ordinary checkpoint, and has no ranks")
        try:
            ordinary = ordinary_files(storage, names)
        except CatalogError as error:
            _add_error(found, error.file or ".", error)
            return kind, found
        files, absent = [(name, None) for name in ordinary.files], ordinary.absent
        weight_map, found.bytes_meta = ordinary.weight_map, ordinary.bytes_meta
    for name in absent:
        found.add("missing", name, f"is missing; {found.remedy(name)}")
    headers: list[tuple[str, int, Header]] = []
    for name, rank in files:
        try:
            size, header, raw = read_header(storage, name)
        except InputError as error:
            _add_error(found, name, error)
            continue
        refuse_unlisted(name, header)
        headers.append((name, size, header))
        found.bytes_meta += len(raw)
        found.files.append((name, size, rank))
        found.tensors += len(header.names)
        found.bytes += size - header.data_begin
    if kind == "checkpoint" and not found.problems:
        try:
            catalog_of(headers, weight_map=weight_map)
        except CatalogError as error:
            found.add("missing", error.file or ".", str(error), tensor=error.tensor)
    found.notes.append("no digests are recorded there: nothing vouches for the bytes")
    return kind, found


def verify_set(
    storage: Storage,
    *,
    ranks: Sequence[int] | None,
    full: bool,
    source: Checkpoint | None,
    execute: Execute,
) -> Verification:
    """Check a set of ours, or the given ranks of it.

    `full` hashes all data; `source` compares it, through provenance, with the checkpoint that the
    set was made from. Raises `SetError` where there is no manifest, so that there is no set.
    """
    found = Verification()
    names = storage.entries()
    if MANIFEST not in names:
        raise SetError(
            f"{storage.location}: has records and no {MANIFEST}: it was lost, or the set is "
            f"incomplete; make it again from the records of all ranks (verify --repair), or finish "
            f"the set with the command that began it",
            file=MANIFEST,
        )
    manifest = _manifest(storage, found)
    world = _world(storage, manifest)
    chosen = tuple(range(world)) if ranks is None else tuple(ranks)
    if max(chosen) >= world:
        raise UsageError(
            f"{storage.location}: rank {max(chosen)} is out of range; the set has "
            f"ranks 0 to {world - 1}"
        )
    parts: list[SoundPart] = []
    for rank in chosen:
        record = _record(storage, found, rank, manifest)
        if record is None:
            continue
        found.records[rank] = record
        parts.extend(_parts(storage, found, record))
        _provenance_file(storage, found, record)
    _companions(storage, found, manifest)
    if manifest is not None:
        _cross_check(found, manifest)
    _unlisted(storage, found, manifest)
    if full:
        _digests(storage, found, parts, execute)
    if source is not None:
        compare_with_source(storage, found, parts, source, execute)
    return found


def _add_error(found: Verification, name: str, error: Exception) -> None:
    tensor = getattr(error, "tensor", None)
    match error:
        case PathNotFound():
            found.add("missing", name, f"is missing: {found.remedy(name)}", tensor=tensor)
        case TruncatedFile():
            found.add("size", name, _said(error), tensor=tensor)
        case _:
            found.add("header", name, _said(error), tensor=tensor)


def _said(error: Exception) -> str:
    """Return an error's message without the file, which a problem names by itself."""
    text, name = str(error), getattr(error, "file", None)
    return text.removeprefix(f"{name}: ") if name else text


def _manifest(storage: Storage, found: Verification) -> Manifest | None:
    data = storage.read(MANIFEST, limit=MAX_JSON_BYTES)
    found.bytes_meta += len(data)
    found.manifest_bytes = data
    try:
        found.manifest = parse_manifest(data, file=MANIFEST)
    except SetError as error:
        text = f"{_said(error)}, or make it from the records (verify --repair)"
        found.add("digest", MANIFEST, text)
    found.files.append((MANIFEST, len(data), None))
    return found.manifest


def _world(storage: Storage, manifest: Manifest | None) -> int:
    """Return the number of ranks, from the manifest or else from any sound record."""
    if manifest is not None:
        return manifest.info.shape.world
    ranks = [rank for name in storage.entries() if (rank := record_rank(name)) is not None]
    for rank in ranks:
        if (record := _quiet_record(storage, rank)) is not None:
            return record.info.shape.world
    return max(ranks, default=-1) + 1


def _record(
    storage: Storage, found: Verification, rank: int, manifest: Manifest | None
) -> Record | None:
    name = record_name(rank)
    try:
        data = storage.read(name, limit=MAX_JSON_BYTES)
    except PathNotFound as error:
        _add_error(found, name, error)
        return None
    found.bytes_meta += len(data)
    found.files.append((name, len(data), rank))
    try:
        record = parse_record(data, file=name, rank=rank)
    except SetError as error:
        # A sound record of another rank under this name was put in the wrong place.
        found.add("rank" if isinstance(error, MisplacedError) else "digest", name, _said(error))
        return None
    if manifest is None:
        return record
    if record.set != manifest.set:
        found.add(
            "stale",
            name,
            f"is of set {record.set}, the manifest of {manifest.set}; {found.remedy(name)}",
        )
        return None
    if not record.info.agrees(manifest.info):
        found.add(
            "stale", name, f"does not say what {MANIFEST} says of the set; {found.remedy(name)}"
        )
        return None
    listed = next(entry for entry in manifest.files if entry.name == name)
    if listed.digest != digest_of(data):
        found.add(
            "digest",
            name,
            f"has digest {digest_of(data)}, {MANIFEST} says {listed.digest}; {found.remedy(name)}",
        )
    return record


def _parts(storage: Storage, found: Verification, record: Record) -> list[SoundPart]:
    """Return the rank files whose size and header are sound; add the problems of the others."""
    parts = []
    for number, entry in enumerate(record.files):
        name = entry.name
        try:
            size = storage.size(name)
        except InputError as error:
            _add_error(found, name, error)
            continue
        try:
            _, header, raw = read_header(storage, name)
        except InputError as error:
            if size == entry.bytes:
                _add_error(found, name, error)
            else:
                _add_size(found, name, size, entry.bytes)
            continue
        found.bytes_meta += len(raw)
        found.files.append((name, size, record.rank))
        if digest_of(raw) != entry.header:
            kind, text = _misplaced(header, record, number)
            found.add(kind, name, f"{text}; {found.remedy(name)}", begin=0, end=len(raw))
            continue
        if size != entry.bytes:
            _add_size(found, name, size, entry.bytes)
            continue
        own = record_name(record.rank)
        if not blocks_fit(entry, header):
            found.add("digest", own, f"its digests do not fit {name}; {found.remedy(own)}")
            continue
        if rank_file_digest(entry.header, entry.blocks) != entry.digest:
            found.add(
                "digest", own, f"its digests of {name} contradict each other; {found.remedy(own)}"
            )
        catalog = catalog_of([(name, size, header)], weight_map=None)
        found.tensors += len(catalog)
        found.bytes += size - header.data_begin
        parts.append(SoundPart(entry, record.rank, catalog))
    return parts


def _add_size(found: Verification, name: str, size: int, expected: int) -> None:
    found.add(
        "size",
        name,
        f"has {size} bytes, expected {expected}; {found.remedy(name)}",
        begin=min(size, expected),
        end=max(size, expected),
    )


def _misplaced(header: Header, record: Record, number: int) -> tuple[str, str]:
    """Tell a header that belongs to another rank, part or set from a damaged one."""
    mark = mark_of(header)
    if mark not in (None, record.set):
        return "stale", f"is of set {mark}, expected {record.set}"
    place = header.metadata.get("rank"), header.metadata.get("part")
    if mark is not None and place != (str(record.rank), str(number)):
        return "rank", (
            f"is part {place[1]} of rank {place[0]}, expected part {number} of rank "
            f"{record.rank}: files were swapped"
        )
    return "digest", f"its header is not the one that {record_name(record.rank)} lists"


def _provenance_file(storage: Storage, found: Verification, record: Record) -> None:
    if record.provenance is None:
        return
    _small(
        storage,
        found,
        provenance_name(record.rank),
        record.provenance.bytes,
        record.provenance.digest,
        record.rank,
        MAX_JSON_BYTES,
    )


def _companions(storage: Storage, found: Verification, manifest: Manifest | None) -> None:
    wanted = {c.name: (c.bytes, c.digest) for r in found.records.values() for c in r.companions}
    if manifest is not None:
        wanted |= {f.name: (f.bytes, f.digest) for f in manifest.files if f.rank is None}
    for name, (nbytes, digest) in sorted(wanted.items()):
        _small(storage, found, name, nbytes, digest, None, COMPANION_BYTES)


def _small(
    storage: Storage,
    found: Verification,
    name: str,
    nbytes: int,
    digest: str,
    rank: int | None,
    limit: int,
) -> None:
    """Check size and digest of a file that is hashed as a whole."""
    try:
        size = storage.size(name)
        if size != nbytes:
            _add_size(found, name, size, nbytes)
            return
        data = storage.read(name, limit=limit)
    except InputError as error:
        _add_error(found, name, error)
        return
    found.bytes_meta += len(data)
    found.files.append((name, size, rank))
    if (is_ := digest_of(data)) != digest:
        found.add("digest", name, f"has digest {is_}, expected {digest}; {found.remedy(name)}")


def _cross_check(found: Verification, manifest: Manifest) -> None:
    """Compare the rank files that the manifest lists with those that the records list."""
    ranks = set(found.records)
    own = {record_name(rank) for rank in ranks} | {provenance_name(rank) for rank in ranks}
    listed = {
        (entry.name, entry.bytes, entry.digest, entry.rank)
        for entry in manifest.files
        if entry.rank in ranks and entry.name not in own
    }
    recorded = {
        (file.name, file.bytes, file.digest, rank)
        for rank, record in found.records.items()
        for file in record.files
    }
    for name, *_ in sorted(listed ^ recorded):
        if not any(problem.file == name for problem in found.problems):
            found.add("digest", name, f"{MANIFEST} and its rank's record do not agree on it")


def _quiet_record(storage: Storage, rank: int) -> Record | None:
    """Return the record of a rank that is not looked at, if it is sound."""
    name = record_name(rank)
    try:
        return parse_record(storage.read(name, limit=MAX_JSON_BYTES), file=name, rank=rank)
    except InputError:
        return None


def _unlisted(storage: Storage, found: Verification, manifest: Manifest | None) -> None:
    """Find rank files, and records, that nothing lists."""
    listed = {f.name for f in manifest.files} if manifest else set()
    for rank in range(_world(storage, manifest)):
        if (record := found.records.get(rank) or _quiet_record(storage, rank)) is not None:
            listed |= {f.name for f in record.files}
    patterns = {Pattern(record.info.pattern) for record in found.records.values()}
    if manifest is not None:
        patterns.add(Pattern(manifest.info.pattern))
    set_id = manifest.set if manifest else next((r.set for r in found.records.values()), None)
    others = []
    for name in storage.entries():
        if name in listed or name in (MANIFEST, SIGNATURE):
            continue
        if name.endswith(".safetensors"):
            try:
                mark = mark_of(read_header(storage, name)[1])
            except InputError:
                mark = None
            if mark not in (None, set_id):
                found.add(
                    "stale",
                    name,
                    f"is of set {mark}, and no record lists it; remove it",
                )
            elif mark is not None or any(p.parse(name) is not None for p in patterns):
                found.add("extra", name, "no record lists it; remove it")
            else:
                others.append(name)
        elif manifest is not None and record_rank(name) is not None:
            found.add("stale", name, f"is not listed by {MANIFEST}; remove it")
        elif manifest is not None:
            others.append(name)
    if others:
        what = "temporary files" if all(n.startswith(OURS) for n in others) else "other files"
        found.notes.append(f"{what} that the set does not list: {', '.join(others[:10])}")


def _digests(
    storage: Storage, found: Verification, parts: Sequence[SoundPart], execute: Execute
) -> None:
    """Hash all data and compare it, block by block."""
    target = DigestTarget([part.catalog for part in parts])
    execute([plan_identity(part.catalog) for part in parts], storage, target, None)
    for slot, part in enumerate(parts):
        found.problems += block_problems(
            part.entry, part.catalog, partial(target.blocks, slot), info=found.info
        )


def block_problems(
    entry: PartEntry,
    catalog: Catalog,
    blocks: Callable[[int], Sequence[str] | None],
    *,
    info: SetInfo | None,
) -> list[Problem]:
    """Compare the blocks of a rank file with those that its record lists.

    `blocks` gives those of a row of `catalog`; None for a tensor that was not read. `info` tells
    what mends the file.
    """
    problems = []
    rows = np.flatnonzero(catalog.file == catalog.files.index(entry.name)).tolist()
    for row, expected in zip(rows, entry.blocks, strict=True):
        tensor, found = catalog.tensor(row), blocks(row)
        if found is None:
            continue
        for number, (want, have) in enumerate(zip(expected, found, strict=True)):
            if want != have:
                begin = tensor.begin + number * BLOCK_BYTES
                text = (
                    f"block {number} has digest {have}, expected {want}; {remedy(info, entry.name)}"
                )
                end = min(begin + BLOCK_BYTES, tensor.end)
                problems.append(Problem(entry.name, tensor.name, text, "digest", begin, end))
    return problems
