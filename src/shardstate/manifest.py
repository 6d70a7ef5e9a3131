"""Manifest and rank record as types; their JSON, which ends with its own digest.

`docs/format.md` is the contract. Everything that a reader relies on is checked here: version,
digest, types, ranges, names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from shardstate.catalog import is_file_name
from shardstate.digest import digest_of
from shardstate.errors import DigestError, MisplacedError, SetError, UsageError
from shardstate.jsontext import json_fault, shown
from shardstate.names import (
    Pattern,
    check_pattern,
    is_companion,
    is_relative_path,
    provenance_name,
    record_name,
)
from shardstate.sharding import MAX_RANKS, Topology

VERSION = 1
MAX_JSON_BYTES = 256 << 20  # of a record or provenance: 36,945 tensors take 5 MB
_SEAL = b',"digest":"'

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]  # errors quote it
SetId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]


class Sizes(msgspec.Struct, frozen=True):
    """Topology of a set as JSON."""

    tp: Size
    pp: Size = 1
    dp: Size = 1


class Source(msgspec.Struct, frozen=True):
    """Where a set came from."""

    location: _Text  # absolute, without credentials
    revision: _Text | None
    fingerprint: Digest


class SetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What manifest and records say alike: `topology` to `source`, in this order."""

    topology: Sizes
    layout: _Text
    stage: _Text
    pattern: _Text
    dtype: _Text
    quantization: _Text | None = None
    platform: _Text | None = None
    engine: _Text | None = None
    engine_version: _Text | None = None
    engine_arguments: dict[str, Any] = {}
    source: Source | None = None

    @property
    def shape(self) -> Topology:
        return Topology(self.topology.tp, self.topology.pp, self.topology.dp)

    def agrees(self, other: SetInfo) -> bool:
        """Whether two records can be of one set; only where the source lay may differ."""
        return _placeless(self) == _placeless(other)


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the set, as the manifest lists it."""

    name: str
    bytes: Natural
    digest: Digest
    rank: Natural | None = None  # global; None for companions


class Manifest(msgspec.Struct, frozen=True):
    """`shardstate.json`: commits the set."""

    set: SetId
    info: SetInfo
    files: tuple[FileEntry, ...]  # everything but manifest and signature, by name


class PartEntry(msgspec.Struct, frozen=True):
    """One rank file, as its rank's record lists it."""

    name: str
    bytes: Natural
    header: Digest
    digest: Digest
    blocks: tuple[tuple[Digest, ...], ...]  # per tensor in file order, one digest a block


class SmallFile(msgspec.Struct, frozen=True):
    """A companion; its name is a relative path."""

    name: str
    bytes: Natural
    digest: Digest


class Sealed(msgspec.Struct, frozen=True):
    """Size and digest of a file whose name is known."""

    bytes: Natural
    digest: Digest


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`shardstate.rank-{R}.json`: commits one rank."""

    set: SetId
    rank: Natural
    info: SetInfo
    files: tuple[PartEntry, ...]  # by part
    aliases: tuple[tuple[str, ...], ...] = ()
    padding: dict[str, list[list[tuple[Natural, Natural]]]] = {}  # tensor → boxes without weights
    replica_of: dict[str, Natural] = {}
    provenance: Sealed | None = None
    companions: tuple[SmallFile, ...] = ()


class _Versioned(msgspec.Struct):
    version: int


class _ManifestRest(msgspec.Struct):
    set: SetId
    files: tuple[FileEntry, ...]


class _RecordRest(msgspec.Struct, kw_only=True):
    set: SetId
    rank: Natural
    files: tuple[PartEntry, ...]
    aliases: tuple[tuple[str, ...], ...]
    padding: dict[str, list[list[tuple[Natural, Natural]]]]
    replica_of: dict[str, Natural]
    provenance: Sealed | None
    companions: tuple[SmallFile, ...]


T = TypeVar("T")


def seal(content: Mapping[str, object]) -> bytes:
    """Return `content` as a JSON file of a set, ended by the digest of all before it."""
    raw = msgspec.json.encode(content)[:-1]
    return raw + _SEAL + digest_of(raw).encode() + b'"}\n'


def unseal(data: bytes, *, file: str) -> bytes:
    """Return the JSON of a file of a set; `SetError` if its digest or version is wrong."""
    cut = data.rfind(_SEAL)
    tail = data[cut + len(_SEAL) :]
    if cut < 0 or not re.fullmatch(rb'[0-9a-f]{64}"\}\n', tail):
        raise DigestError(
            f"{file}: does not end with its digest; it is damaged or only half there: "
            f"copy it again, or shard again",
            file=file,
        )
    found = digest_of(data[:cut])
    if found != tail[:64].decode():
        raise DigestError(
            f"{file}: its bytes have digest {found}, and it ends with {tail[:64].decode()}; "
            f"it is damaged: copy it again, or shard again",
            file=file,
        )
    if (wrong := json_fault(data)) is not None:
        raise SetError(f"{file}: {wrong}; it is no file of this format version", file=file)
    version = decode(data, _Versioned, file=file).version
    if version != VERSION:
        raise SetError(
            f"{file}: has format version {version}, this shardstate reads {VERSION}; "
            f"install a newer shardstate",
            file=file,
        )
    return data


def decode(data: bytes, type_: type[T], *, file: str) -> T:
    """Return JSON as `type_`; `SetError` that names the wrong entry otherwise."""
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SetError(
            f"{file}: {error}; it is no file of this format version", file=file
        ) from None


def manifest_json(manifest: Manifest) -> bytes:
    """Return the bytes of `shardstate.json`."""
    return seal(
        {
            "version": VERSION,
            "set": manifest.set,
            **msgspec.to_builtins(manifest.info),
            "files": manifest.files,
        }
    )


def parse_manifest(data: bytes, *, file: str) -> Manifest:
    """Return the manifest; `SetError` for anything that a reader could not rely on."""
    data = unseal(data, file=file)
    rest = decode(data, _ManifestRest, file=file)
    info = decode(data, SetInfo, file=file)
    _check_info(info, file=file)
    names = [entry.name for entry in rest.files]
    check_names(names, file=file, folders=True)
    world = info.shape.world
    ranks = {entry.rank for entry in rest.files if entry.rank is not None}
    if len(ranks) != world or max(ranks) >= world:  # no set of `world`: it may be 2**60
        raise SetError(
            f"{file}: lists files of ranks {sorted(ranks)}, expected 0 to {world - 1}", file=file
        )
    _check_owners(rest.files, check_pattern(info.pattern, info.shape), file=file)
    listed = set(names)
    for rank in range(world):
        if record_name(rank) not in listed:
            raise SetError(f"{file}: does not list {record_name(rank)}", file=file)
    return Manifest(rest.set, info, rest.files)


def record_json(record: Record) -> bytes:
    """Return the bytes of a rank record."""
    return seal(
        {
            "version": VERSION,
            "set": record.set,
            "rank": record.rank,
            **msgspec.to_builtins(record.info),
            "files": record.files,
            "aliases": record.aliases,
            "padding": record.padding,
            "replica_of": record.replica_of,
            "provenance": record.provenance,
            "companions": record.companions,
        }
    )


def parse_record(data: bytes, *, file: str, rank: int) -> Record:
    """Return the record of `rank`; `SetError` for anything that a reader could not rely on."""
    data = unseal(data, file=file)
    rest = decode(data, _RecordRest, file=file)
    info = decode(data, SetInfo, file=file)
    _check_info(info, file=file)
    if rest.rank != rank or rank >= info.shape.world:
        raise MisplacedError(
            f"{file}: is the record of rank {rest.rank} of {info.shape.world}, expected rank "
            f"{rank}; files were swapped or renamed",
            file=file,
        )
    check_names([entry.name for entry in rest.files], file=file, folders=False)
    companions = [entry.name for entry in rest.companions]
    check_names(companions, file=file, folders=True)
    _check_companions(companions, file=file)
    pattern = check_pattern(info.pattern, info.shape)
    for part, entry in enumerate(rest.files):
        if entry.name != pattern.name(rank, part):
            raise SetError(
                f"{file}: its part {part} is {entry.name}, expected {pattern.name(rank, part)}",
                file=file,
            )
    return Record(
        set=rest.set,
        rank=rest.rank,
        info=info,
        files=rest.files,
        aliases=rest.aliases,
        padding=rest.padding,
        replica_of=rest.replica_of,
        provenance=rest.provenance,
        companions=rest.companions,
    )


def manifest_of(records: Sequence[tuple[Record, bytes]]) -> Manifest:
    """Return the manifest of a set from the records (and their bytes) of all its ranks.

    It is a function of the records alone: whoever computes it gets the same bytes. `SetError` that
    names the ranks if the records are not of one set.
    """
    ordered = sorted(records, key=lambda each: each[0].rank)
    first = ordered[0][0]
    entries: dict[str, FileEntry] = {}
    for record, data in ordered:
        if record.set != first.set or not record.info.agrees(first.info):
            raise SetError(
                f"the records of rank {first.rank} and rank {record.rank} are not of one set "
                f"({first.set} and {record.set}); save all ranks again"
            )
        rank = record.rank
        own = [
            *(FileEntry(f.name, f.bytes, f.digest, rank) for f in record.files),
            FileEntry(record_name(rank), len(data), digest_of(data), rank),
            *(FileEntry(c.name, c.bytes, c.digest) for c in record.companions),
        ]
        if (sealed := record.provenance) is not None:
            own.append(FileEntry(provenance_name(rank), sealed.bytes, sealed.digest, rank))
        for entry in own:
            if entries.setdefault(entry.name, entry) != entry:
                raise SetError(
                    f"{entry.name}: rank {first.rank} and rank {rank} recorded different content; "
                    f"the source changed in between: shard all ranks again",
                    file=entry.name,
                )
    return Manifest(first.set, first.info, tuple(entries[name] for name in sorted(entries)))


def set_id(*, info: SetInfo, fingerprint: str, max_part_bytes: int, rules_digest: str) -> str:
    """Return the id of a set: a digest of all that decides its bytes, and of nothing else."""
    content: dict[str, object] = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "layout": info.layout,
        "stage": info.stage,
        "topology": info.topology,
        "dtype": info.dtype,
        "pattern": info.pattern,
        "max_part_size": max_part_bytes,
        "rules": rules_digest,
    }
    if info.layout == "vllm":
        content |= {
            "platform": info.platform,
            "engine_version": info.engine_version,
            "engine_arguments": dict(sorted(info.engine_arguments.items())),
        }
    return digest_of(msgspec.json.encode(content))


def _placeless(info: SetInfo) -> SetInfo:
    if info.source is None:
        return info
    return msgspec.structs.replace(info, source=Source("", None, info.source.fingerprint))


def _check_info(info: SetInfo, *, file: str) -> None:
    for key, value, allowed in (
        ("layout", info.layout, ("rules", "vllm")),
        ("stage", info.stage, ("checkpoint", "model", "kernel")),
    ):
        if value not in allowed:
            raise SetError(f"{file}: {key} is {value!r}, expected one of {allowed}", file=file)
    try:
        check_pattern(info.pattern, info.shape)
    except UsageError as error:
        raise SetError(f"{file}: {error}", file=file) from None


def check_names(names: Sequence[str], *, file: str, folders: bool) -> None:
    """Raise `SetError` unless `names` are those of files below; `folders` allows paths."""
    for name in names:
        plain = is_relative_path(name) if folders else is_file_name(name)
        if not plain or name.startswith(".shardstate"):
            raise SetError(
                f"{file}: lists {shown(name)}, which is no name of a file below", file=file
            )
    listed = set(names)
    if len(listed) != len(names):
        raise SetError(f"{file}: lists a file twice", file=file)
    for name in names:
        # A path and a folder of it: whoever copies the set could write one through the other.
        if any(name[:at] in listed for at, sign in enumerate(name) if sign == "/"):
            raise SetError(f"{file}: lists {shown(name)} below another file", file=file)


def _check_companions(names: Sequence[str], *, file: str) -> None:
    """Raise `SetError` for a companion under a name of weights, or of ours, or of a repository."""
    for name in names:
        if not is_companion(name):
            raise SetError(
                f"{file}: lists {shown(name)} as a companion, a name that none may have", file=file
            )


def _check_owners(files: Sequence[FileEntry], pattern: Pattern, *, file: str) -> None:
    """Raise `SetError` unless each file has a name that its rank's files have."""
    _check_companions([entry.name for entry in files if entry.rank is None], file=file)
    for entry in files:
        if entry.rank is None or entry.name in (
            record_name(entry.rank), provenance_name(entry.rank)
        ):  # fmt: skip
            continue
        place = pattern.parse(entry.name)
        if place is None or place[0] != entry.rank:
            raise SetError(
                f"{file}: lists {shown(entry.name)} for rank {entry.rank}, whose files are "
                f"{pattern.name(entry.rank, 0)}, …",
                file=file,
            )
