"""What is fuzzed: each parser of what may be hostile, as a function of bytes.

A function returns whether the bytes were accepted. Anything but an error of ours escapes, and so
does a file that `safetensors` sees otherwise; both are findings. Errors must be short and whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from safetensors import SafetensorError, deserialize

from shardstate.catalog import Catalog, catalog_of, parse_index
from shardstate.digest import digest_of
from shardstate.errors import HeaderError, ShardStateError
from shardstate.header import PREFIX_BYTES, header_length, parse_header
from shardstate.inventory import Note, Replacing
from shardstate.jsontext import json_fault
from shardstate.manifest import (
    decode,
    manifest_json,
    parse_manifest,
    parse_record,
    record_json,
    unseal,
)
from shardstate.plan import plan_identity
from shardstate.provenance import parse_provenance, provenance_json
from shardstate.sharding import match_rules, parse_rules, rules_json
from shardstate.signing import parse_signature

_MOST_DATA = 1 << 16


class Finding(Exception):
    """Two readers disagree, or a round trip does not close."""


def refused(error: ShardStateError) -> bool:
    """Return False, after a look at the error."""
    text = str(error)
    if not text or len(text) > 20_000:
        raise Finding(f"an error of {len(text)} characters")
    return False


def file(data: bytes) -> bool:
    """A whole safetensors file, against the reference."""
    catalog: Catalog | None = None
    try:
        length = header_length(data[:PREFIX_BYTES], file="f", file_bytes=len(data))
        raw = data[PREFIX_BYTES : PREFIX_BYTES + length]
        header = parse_header(raw, file="f", file_bytes=len(data))
    except HeaderError as error:
        return refused(error)
    try:
        reference = dict(deserialize(data))
    except SafetensorError as error:
        raise Finding(f"safetensors refuses it: {error}") from None
    catalog = catalog_of([("f", len(data), header)], weight_map=None)
    ours = {t.name: (t.dtype, [*t.shape], data[t.begin : t.end]) for t in catalog}
    theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in reference.items()}
    if ours != theirs:
        raise Finding("safetensors sees other tensors")
    plan_identity(catalog)
    return True


def header(data: bytes) -> bool:
    """The JSON of a header, with as much data as it speaks of."""
    try:
        entries = json.loads(data)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
        size = max(0, min(int(max(ends, default=0)), _MOST_DATA))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        size = len(data) % 16
    body = bytes(i % 251 for i in range(size))
    return file(len(data).to_bytes(PREFIX_BYTES, "little") + data + body)


def sealed(data: bytes) -> bytes:
    """Return JSON as a file of a set whose digest is right, as an enemy would write it."""
    raw = data.rstrip().removesuffix(b"}")
    return raw + b',"digest":"' + digest_of(raw).encode() + b'"}\n'


def manifest(data: bytes) -> bool:
    """A manifest."""
    try:
        found = parse_manifest(sealed(data), file="f")
    except ShardStateError as error:
        return refused(error)
    if parse_manifest(manifest_json(found), file="f") != found:
        raise Finding("another manifest after a round trip")
    return True


def record(data: bytes) -> bool:
    """A rank's record."""
    try:
        found = parse_record(sealed(data), file="f", rank=0)
    except ShardStateError as error:
        return refused(error)
    if parse_record(record_json(found), file="f", rank=0) != found:
        raise Finding("another record after a round trip")
    return True


def provenance(data: bytes) -> bool:
    """A rank's provenance."""
    try:
        found = parse_provenance(sealed(data), file="f", set_id="s", rank=0)
    except ShardStateError as error:
        return refused(error)
    again = provenance_json(found, set_id="s", rank=0)
    if list(parse_provenance(again, file="f", set_id="s", rank=0)) != list(found):
        raise Finding("another plan after a round trip")
    return True


def notes(data: bytes) -> bool:
    """What an interrupted run leaves, and a signature."""
    accepted = False
    for type_ in (Note, Replacing):
        try:
            decode(unseal(sealed(data), file="f"), type_, file="f")
            accepted = True
        except ShardStateError as error:
            refused(error)
    try:
        parse_signature(sealed(data), file="f")
    except ShardStateError as error:
        return refused(error) or accepted
    return True


def index(data: bytes) -> bool:
    """The index of a checkpoint in many files."""
    try:
        found = parse_index(data)
    except ShardStateError as error:
        return refused(error)
    if json.loads(data)["weight_map"] != found:
        raise Finding("json reads another index")
    return True


def rules(data: bytes) -> bool:
    """Split rules, with a configuration that they may refer to."""
    config = {"head_dim": 64, "num_attention_heads": 8, "hidden_size": -1, "x": 2**70, "y": None}
    try:
        found = parse_rules(data, config=config, where="rules")
        match_rules(["model.layers.0.self_attn.q_proj.weight", ""], found, where="rules")
    except ShardStateError as error:
        return refused(error)
    if parse_rules(rules_json(found), config=None, where="rules") != found:
        raise Finding("other rules after a round trip")
    return True


def config(data: bytes) -> bool:
    """A configuration, or any JSON."""
    if (fault := json_fault(data, constants=True)) is not None:
        if len(fault) > 1000:
            raise Finding("a long fault")
        return False
    json.loads(data)
    return True


PARSERS: Mapping[str, Callable[[bytes], bool]] = {
    each.__name__: each
    for each in (file, header, manifest, record, provenance, notes, index, rules, config)
}
