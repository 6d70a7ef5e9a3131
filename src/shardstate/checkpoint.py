"""Opens what lies at a path: an ordinary checkpoint, a set of ours, or one that vLLM wrote.

Only headers and small JSON files are read. What is asked for later is checked when it is asked for.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from shardstate.catalog import INDEX_NAME, Catalog, catalog_of, parse_index
from shardstate.digest import SAMPLES, block_count, digest_of, fingerprint, sample_ranges
from shardstate.errors import (
    CatalogError,
    ChangedFile,
    DigestError,
    InputError,
    SetError,
    UsageError,
)
from shardstate.header import PREFIX_BYTES, Header, header_length, parse_header
from shardstate.jsontext import json_fault
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
    CONFIG,
    DEFAULT_PATTERN,
    MANIFEST,
    PIPELINE_PATTERN,
    Pattern,
    check_pattern,
    record_name,
    record_rank,
)
from shardstate.sharding import Topology
from shardstate.storage import Entry, Storage, for_each

_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 64 << 20  # 36,945 tensors take 4 MB
_USUAL_HEADER_BYTES = 64 << 10  # read at once, since few are longer, and a request costs more
_PICKLES = (".bin", ".pt", ".pth", ".gguf", ".h5")


@dataclass
class Checkpoint:
    """An open checkpoint. `close` it, or use it as a context."""

    storage: Storage
    kind: str  # "checkpoint", "shardstate" or "vllm"
    topology: Topology | None = None  # of a set
    catalog: Catalog | None = None  # of an ordinary checkpoint
    manifest: Manifest | None = None
    manifest_bytes: bytes = b""
    # The files of a set that vLLM wrote, by rank.
    parts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    bytes_meta: int = 0  # headers and JSON read so far
    seen: Mapping[str, Entry] = field(default_factory=dict)  # what was there when it was opened
    _records: dict[int, tuple[Record, bytes]] = field(default_factory=dict)
    _catalogs: dict[int, Catalog] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def location(self) -> str:
        return self.storage.location

    @property
    def committed(self) -> bool | None:
        """Whether a set has its manifest; None for what never has one."""
        return self.manifest is not None if self.kind == "shardstate" else None

    @property
    def info(self) -> SetInfo | None:
        """What a set of ours says of itself."""
        if self.manifest is not None:
            return self.manifest.info
        return next((record.info for record, _ in self._records.values()), None)

    @property
    def set_id(self) -> str | None:
        """The id of a set of ours."""
        if self.manifest is not None:
            return self.manifest.set
        return next((record.set for record, _ in self._records.values()), None)

    @property
    def stage(self) -> str:
        return self.info.stage if self.info else "kernel" if self.kind == "vllm" else "checkpoint"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks whose files are there."""
        if self.manifest is not None:
            return tuple(range(self.manifest.info.shape.world))
        return tuple(sorted(self._records or self.parts))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.storage.close()

    def record(self, rank: int) -> Record:
        """Return the record of `rank`, in agreement with manifest or all other records."""
        if rank not in self._records:
            name = record_name(rank)
            data = self.storage.read(name, limit=MAX_JSON_BYTES)
            self.bytes_meta += len(data)
            self._records[rank] = parse_record(data, file=name, rank=rank), data
        record, data = self._records[rank]
        if self.manifest is not None:
            entry = next(f for f in self.manifest.files if f.name == record_name(rank))
            if record.set != self.manifest.set or entry.digest != digest_of(data):
                raise SetError(
                    f"{record_name(rank)}: is of set {record.set}, digest {digest_of(data)}; "
                    f"{MANIFEST} expects set {self.manifest.set}, digest {entry.digest}: the set "
                    f"is being replaced or was left half-replaced; shard again with --force",
                    file=record_name(rank),
                )
        return record

    def rank_catalog(self, rank: int) -> Catalog:
        """Return the tensors of one rank of a set; size, header, rank and set of each file fit."""
        if rank not in self._catalogs:
            try:
                self._catalogs[rank] = self._open_rank(rank)
            except InputError as error:
                raise error.located(self.location) from None
        return self._catalogs[rank]

    def check_unchanged(self, files: Iterable[str]) -> None:
        """Raise `ChangedFile` if one of `files` is not what it was when this was opened.

        What was read between is then of one generation: of no file half of the old content.
        """
        try:
            check_unchanged(self.storage, self.seen, files)
        except ChangedFile as error:
            raise error.located(self.location) from None

    def _open_rank(self, rank: int) -> Catalog:
        if self.kind == "vllm":
            files = [(name, *self.header(name)[:2]) for name in self.parts[rank]]
            for name, _, header in files:
                refuse_unlisted(name, header)
            return catalog_of(files, weight_map=None)
        record = self.record(rank)
        headers = for_each(
            self.storage,
            lambda part: self.part_header(record.files[part], record, part),
            range(len(record.files)),
        )
        files = [
            (entry.name, entry.bytes, header)
            for entry, header in zip(record.files, headers, strict=True)
        ]
        catalog = catalog_of(files, weight_map=None)
        _check_padding(record, catalog)
        return catalog

    def unlisted(self, rank: int) -> tuple[str, ...]:
        """Return files under a rank's names that its record does not list: they do not count."""
        if self.kind != "shardstate":
            return ()
        record = self.record(rank)
        pattern = check_pattern(record.info.pattern, record.info.shape)
        listed = {entry.name for entry in record.files}
        places = {name: pattern.parse(name) for name in self.storage.entries()}
        return tuple(
            name
            for name, place in places.items()
            if place is not None and place[0] == rank and name not in listed
        )

    def part_header(self, entry: PartEntry, record: Record, part: int) -> Header:
        """Return the header of a rank file that fits its record, or raise `InputError`."""
        nbytes = self.storage.size(entry.name)
        if nbytes != entry.bytes:
            raise SetError(
                f"{entry.name}: has {nbytes} bytes, its rank's record says {entry.bytes}; "
                f"{'truncated' if nbytes < entry.bytes else 'replaced'}: copy it again",
                file=entry.name,
            )
        _, header, raw = self.header(entry.name)
        if (found := digest_of(raw)) != entry.header:
            raise DigestError(
                f"{entry.name}: its header has digest {found}, its rank's record says "
                f"{entry.header}; damaged or of another set: copy it again",
                file=entry.name,
            )
        want = {"set": record.set, "rank": str(record.rank), "part": str(part)}
        for key, value in want.items():
            if header.metadata.get(key) != value:
                raise SetError(
                    f"{entry.name}: its header says {key} {header.metadata.get(key)!r}, expected "
                    f"{value!r}; files were swapped",
                    file=entry.name,
                )
        if not blocks_fit(entry, header):
            name = record_name(record.rank)
            raise SetError(f"{name}: its digests do not fit {entry.name}; copy it again", file=name)
        return header

    def header(self, name: str) -> tuple[int, Header, bytes]:
        """Return size, header and the header's bytes (prefix included) of a safetensors file."""
        size, header, raw = read_header(self.storage, name)
        with self._lock:
            self.bytes_meta += len(raw)
        return size, header, raw

    def config(self) -> dict[str, Any] | None:
        """Return the model's `config.json`, or None where there is none."""
        raw = self.config_bytes()
        if not raw:
            return None
        if (wrong := json_fault(raw, constants=True)) is not None:
            raise InputError(f"{self.location}/{CONFIG}: {wrong}; fetch it again", file=CONFIG)
        found = json.loads(raw)
        if not isinstance(found, dict):
            raise InputError(
                f"{self.location}/{CONFIG}: is no JSON object; fetch it again", file=CONFIG
            )
        return found

    def config_bytes(self) -> bytes:
        """Return the bytes of `config.json`; none where there is none."""
        if CONFIG not in self.storage.entries():
            return b""
        data = self.storage.read(CONFIG, limit=_MAX_CONFIG_BYTES)
        self.bytes_meta += len(data)
        return data

    def fingerprint(self) -> str:
        """Return the fingerprint of an ordinary checkpoint."""
        assert self.catalog is not None

        def header(name: str) -> tuple[str, int, bytes]:
            return (name, *read_header_bytes(self.storage, name))

        def sample(place: tuple[str, int, int]) -> bytes:
            name, begin, end = place
            data = bytearray(end - begin)
            self.storage.read_into(name, begin, [memoryview(data)])
            return bytes(data)

        headers = for_each(self.storage, header, self.catalog.files)
        places = [
            (name, begin, end)
            for name, size, raw in headers
            for begin, end in sample_ranges(len(raw), size)
        ]
        samples = iter(for_each(self.storage, sample, places))
        return fingerprint(
            self.config_bytes(), ((*each, list(islice(samples, SAMPLES))) for each in headers)
        )


def check_unchanged(storage: Storage, seen: Mapping[str, Entry], files: Iterable[str]) -> None:
    """Raise `ChangedFile` if one of `files` is not there any more as it was `seen`."""
    now = storage.entries()
    for name in files:
        before, after = seen.get(name), now.get(name)
        if before is None or before == after:
            continue
        what = "vanished" if after is None else "was replaced or written to"
        raise ChangedFile(
            f"{name}: {what} while it was read; what was loaded is not used: load it again once "
            f"nobody writes there",
            file=name,
        )


def blocks_fit(entry: PartEntry, header: Header) -> bool:
    """Whether a record lists a digest for each block of each tensor of a rank file."""
    sizes = [end - begin for begin, end in zip(header.begins, header.ends, strict=True)]
    return [block_count(size) for size in sizes] == [len(blocks) for blocks in entry.blocks]


def _check_padding(record: Record, catalog: Catalog) -> None:
    """Raise `SetError` unless the padding that a record lists lies in its tensors."""
    for tensor, boxes in record.padding.items():
        row = catalog.row.get(tensor)
        shape = () if row is None else catalog.shapes[row]
        for box in boxes:
            fits = len(box) == len(shape) and all(
                begin <= end <= size for (begin, end), size in zip(box, shape, strict=True)
            )
            if row is None or not fits:
                name = record_name(record.rank)
                raise SetError(
                    f"{name}: its padding of {tensor} does not fit what is stored; copy it again",
                    file=name,
                    tensor=tensor,
                )


def read_header(storage: Storage, name: str) -> tuple[int, Header, bytes]:
    """Return size, header and the header's bytes (prefix included) of a safetensors file."""
    size, raw = read_header_bytes(storage, name)
    return size, parse_header(raw[PREFIX_BYTES:], file=name, file_bytes=size), raw


def mark_of(header: Header) -> str | None:
    """Return the set that a rank file of ours says it is of; None for any other file."""
    return header.metadata.get("set", "") if "shardstate" in header.metadata else None


def read_header_bytes(storage: Storage, name: str) -> tuple[int, bytes]:
    """Return a file's size and its header with the length prefix."""
    size = storage.size(name)
    first = bytearray(min(_USUAL_HEADER_BYTES, size))
    storage.read_into(name, 0, [memoryview(first)])
    length = header_length(bytes(first[:PREFIX_BYTES]), file=name, file_bytes=size)
    rest = bytearray(max(0, PREFIX_BYTES + length - len(first)))
    if rest:
        storage.read_into(name, len(first), [memoryview(rest)])
    return size, bytes(first[: PREFIX_BYTES + length] + rest)


def open_checkpoint(storage: Storage, *, pattern: str | None) -> Checkpoint:
    """Return what `storage` holds; `InputError` if that is no checkpoint.

    `pattern` names the rank files of a set that vLLM wrote with one of its own.
    """
    names = storage.entries()
    found = _opened(storage, names, pattern)
    found.seen = names
    return found


def _opened(storage: Storage, names: Mapping[str, Entry], pattern: str | None) -> Checkpoint:
    records = sorted(rank for name in names if (rank := record_rank(name)) is not None)
    if MANIFEST in names or records:
        found = _open_set(storage, has_manifest=MANIFEST in names, records=records)
        info = found.info
        assert info is not None
        if pattern is not None and pattern != info.pattern:
            raise UsageError(f"pattern {pattern!r} contradicts the set's {info.pattern!r}")
        return found
    if (unmarked := find_parts(names, pattern)) is not None:
        if holes := unmarked.holes:
            raise CatalogError(
                f"{storage.location}: {holes[0]} is missing between the files that are there; "
                f"copy it, or save the set again",
                file=holes[0],
            )
        return _open_vllm(storage, unmarked)
    if pattern is not None:
        raise InputError(f"{storage.location}: holds no file of the pattern {pattern!r}")
    return _open_ordinary(storage, names)


def _open_set(storage: Storage, *, has_manifest: bool, records: list[int]) -> Checkpoint:
    found = Checkpoint(storage, "shardstate")
    if has_manifest:
        data = storage.read(MANIFEST, limit=MAX_JSON_BYTES)
        found.bytes_meta += len(data)
        found.manifest = parse_manifest(data, file=MANIFEST)
        found.manifest_bytes = data
    else:
        read = [found.record(rank) for rank in records]
        for record in read[1:]:
            if record.set != read[0].set or not record.info.agrees(read[0].info):
                raise SetError(
                    f"{storage.location}: has no {MANIFEST}, and the records of ranks "
                    f"{read[0].rank} and {record.rank} are of two sets ({read[0].set} and "
                    f"{record.set}): the set is being replaced or was left half-replaced; "
                    f"finish or repeat what wrote it",
                    file=record_name(record.rank),
                )
    assert found.info is not None
    found.topology = found.info.shape
    return found


@dataclass(frozen=True, slots=True)
class Unmarked:
    """The rank files of a set without records, as vLLM writes them."""

    parts: Mapping[int, tuple[str, ...]]  # by global rank, in order
    holes: tuple[str, ...]  # names that are missing between those that are there
    topology: Topology


def find_parts(names: Iterable[str], pattern: str | None) -> Unmarked | None:
    """Return the files that `pattern`, or else one of vLLM's, makes; None if there are none."""
    names = list(names)
    for text in (pattern,) if pattern is not None else (DEFAULT_PATTERN, PIPELINE_PATTERN):
        several = [1 + (f"{{{axis}_rank}}" in text) for axis in ("pp", "dp")]
        fields = check_pattern(text, Topology(1, *several)).fields
        places = {place: name for name in names if (place := fields(name)) is not None}
        if not places:
            continue
        dp, pp, tp = (max(place[i] for place in places) + 1 for i in (0, 1, 2))
        parts: dict[int, list[int]] = defaultdict(list)
        for replica, stage, rank, part in sorted(places):
            parts[(replica * pp + stage) * tp + rank].append(part)
        template = Pattern(text, tp, pp)
        # Names can say any number: only the first hole of each rank is looked for.
        first = next((i for i in range(len(parts) + 1) if i not in parts), 0)
        holes = [template.name(first, 0)] if len(parts) < tp * pp * dp else []
        for index, own in sorted(parts.items()):
            if own[-1] >= len(own):
                hole = next(i for i, part in enumerate(own) if i != part)
                holes.append(template.name(index, hole))
        made = {i: tuple(template.name(i, part) for part in own) for i, own in parts.items()}
        return Unmarked(
            dict(sorted(made.items())), tuple(holes), Topology(1) if holes else Topology(tp, pp, dp)
        )
    return None


@dataclass(frozen=True, slots=True)
class Ordinary:
    """The weight files of an ordinary checkpoint."""

    files: tuple[str, ...]  # those that count and are there
    absent: tuple[str, ...]  # those that the index names and that are not there
    weight_map: Mapping[str, str] | None  # the index, if there is one
    bytes_meta: int


def ordinary_files(storage: Storage, names: Collection[str]) -> Ordinary:
    """Return which files hold the weights; `InputError` if none does."""
    if INDEX_NAME in names:
        data = storage.read(INDEX_NAME, limit=_MAX_INDEX_BYTES)
        weight_map = parse_index(data)
        files = sorted(set(weight_map.values()))
        return Ordinary(
            tuple(name for name in files if name in names),
            tuple(name for name in files if name not in names),
            weight_map,
            len(data),
        )
    if "model.safetensors" in names:
        return Ordinary(("model.safetensors",), (), None, 0)
    found = tuple(sorted(name for name in names if name.endswith(".safetensors")))
    if not found:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        what = f"only {pickles[0]}" if pickles else "none of them" if names else "nothing"
        advice = (
            "convert the weights to safetensors first (save_pretrained does)"
            if pickles
            else "check the path"
        )
        raise InputError(
            f"{storage.location}: expected model.safetensors, {INDEX_NAME} or a sharded set, "
            f"found {what}; {advice}"
        )
    return Ordinary(found, (), None, 0)


def refuse_unlisted(name: str, header: Header) -> None:
    """Raise `SetError` for a file that carries the mark of a set where no record is."""
    if mark_of(header) is not None:
        raise SetError(
            f"{name}: is a file of a shardstate set, and no record lists it: what wrote it was "
            f"interrupted; run it again",
            file=name,
        )


def ordinary_headers(storage: Storage, names: Sequence[str]) -> list[tuple[str, int, Header]]:
    """Return name, size and header of files that belong to no set; far away, of many at once."""

    def one(name: str) -> tuple[str, int, Header]:
        size, header, _ = read_header(storage, name)
        refuse_unlisted(name, header)
        return name, size, header

    return for_each(storage, one, names)


def _open_vllm(storage: Storage, unmarked: Unmarked) -> Checkpoint:
    found = Checkpoint(storage, "vllm", unmarked.topology, parts=unmarked.parts)
    first = unmarked.parts[0][0]
    refuse_unlisted(first, found.header(first)[1])
    return found


def _open_ordinary(storage: Storage, names: Collection[str]) -> Checkpoint:
    found = Checkpoint(storage, "checkpoint")
    ordinary = ordinary_files(storage, names)
    found.bytes_meta = ordinary.bytes_meta
    if absent := ordinary.absent:
        raise CatalogError(
            f"{storage.location}: {INDEX_NAME} names {absent[0]}, which is not there"
            f"{f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''}; fetch it again",
            file=absent[0],
        )
    headers = ordinary_headers(storage, ordinary.files)
    found.bytes_meta += sum(header.data_begin for _, _, header in headers)
    found.catalog = catalog_of(headers, weight_map=ordinary.weight_map)
    if not len(found.catalog):
        raise CatalogError(f"{storage.location}: its files hold no tensor", file=ordinary.files[0])
    return found
