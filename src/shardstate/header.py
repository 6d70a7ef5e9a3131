"""One safetensors header: parse and validate in one pass, or serialise.

A file is 8 bytes with the length of the header (little-endian), the header (JSON), and the data of
the tensors without gap or overlap. Everything is checked here; nothing else checks it again.
Source: the `safetensors` crate; whatever it refuses is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from shardstate.dtypes import DTYPES
from shardstate.errors import HeaderError
from shardstate.jsontext import first_repeated, shown
from shardstate.layout import Shape, element_count

PREFIX_BYTES = 8  # length of the header, before it
MAX_HEADER_BYTES = 100_000_000  # as in safetensors, without the prefix
_MAX_INT = 2**63 - 1
_SHOWN = 200  # characters of a name, and
_AXES = 64  # sizes of a shape, that an error quotes

_Natural = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)]


class _Info(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


_ENTRIES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO = msgspec.json.Decoder(_Info)
_METADATA = msgspec.json.Decoder(dict[str, str])


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file in columns, in the order of their data."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # safetensors tags
    shapes: tuple[Shape, ...]
    begins: tuple[int, ...]  # bytes from the start of the file
    ends: tuple[int, ...]
    metadata: Mapping[str, str]
    data_begin: int  # bytes from the start of the file: prefix, header and padding end here


def header_length(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """Return the bytes of the header, prefix excluded, that the file's first 8 bytes announce."""
    if len(prefix) < PREFIX_BYTES:
        raise HeaderError(
            f"{file}: has {file_bytes} bytes, too few for a safetensors file; fetch it again",
            file=file,
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{file}: announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} that "
            f"safetensors allows; it is no safetensors file, or damaged",
            file=file,
        )
    if PREFIX_BYTES + length > file_bytes:
        raise HeaderError(
            f"{file}: its header should end at byte {PREFIX_BYTES + length}, and the file ends at "
            f"{file_bytes}; it is truncated: fetch it again",
            file=file,
        )
    return length


def parse_header(raw: bytes, *, file: str, file_bytes: int) -> Header:
    """Return the header whose JSON is `raw`, checked against the size of its file.

    Raises `HeaderError` unless the tensors cover the data exactly: no gap, no overlap, no byte
    after the last, and shape × dtype equal to the length of each.
    """

    def fault(text: str, tensor: str | None = None) -> HeaderError:
        # A name may be as long as the header.
        where = f"{file}: " + (f"{_brief(tensor)}: " if tensor is not None else "")
        return HeaderError(
            f"{where}{text}; the file is damaged, or no safetensors file: fetch it again",
            file=file,
            tensor=tensor,
        )

    if raw[:1] != b"{":
        raise fault(f"the header begins with {raw[:1]!r}, expected b'{{'")
    try:
        entries = _ENTRIES.decode(raw)
        described = entries.pop("__metadata__", None)
        metadata = {} if described is None else _METADATA.decode(described)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise fault(f"the header is not the JSON of safetensors: {error}") from None
    rows: list[tuple[int, int, str, _Info]] = []
    for name, entry in entries.items():
        try:
            info = _INFO.decode(entry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise fault(f"{error}", name) from None
        rows.append((*info.data_offsets, name, info))
    # Without escapes an entry has five strings: a cheap proof that no name or key came twice.
    strings = 5 * len(rows) + (0 if described is None else 1 + 2 * len(metadata))
    if b"\\" in raw or b"-0" in raw or raw.count(b'"') != 2 * strings:
        _refuse_duplicates(raw, fault)
    rows.sort(key=lambda row: row[:2])
    data_begin = PREFIX_BYTES + len(raw)
    at = 0
    for begin, end, name, info in rows:
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise fault(f"unknown dtype {shown(info.dtype)}; known are {known}", name)
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise fault(f"begins at data byte {begin}, expected {at}: {what}", name)
        elements = element_count(info.shape)
        if elements is None:
            said = _shape(info.shape)
            raise fault(f"shape {said} overflows, expected sizes below 2**63", name)
        bits = elements * dtype.bits
        if bits != (end - begin) * 8:
            raise fault(
                f"shape {_shape(info.shape)} of {info.dtype} takes {bits / 8:g} bytes, "
                f"and its offsets hold {end - begin}",
                name,
            )
        at = end
    if data_begin + at != file_bytes:
        short = data_begin + at > file_bytes
        raise fault(
            f"its tensors end at byte {data_begin + at}, and the file at {file_bytes}: "
            f"{'truncated' if short else 'bytes that belong to no tensor'}"
        )
    return Header(
        tuple(row[2] for row in rows),
        tuple(row[3].dtype for row in rows),
        tuple(row[3].shape for row in rows),
        tuple(data_begin + row[0] for row in rows),
        tuple(data_begin + row[1] for row in rows),
        metadata,
        data_begin,
    )


def serialise_header(
    tensors: Iterable[tuple[str, str, Shape, int]], *, metadata: Mapping[str, str], align: int
) -> bytes:
    """Return prefix, JSON and padding for `tensors` (name, dtype tag, shape, bytes) in data order.

    Spaces pad the header so that data begins at a multiple of `align` bytes of the file.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + nbytes)}
        at += nbytes
    raw = msgspec.json.encode(entries)
    raw += b" " * (-(PREFIX_BYTES + len(raw)) % align)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(
            f"the header of {len(entries) - 1} tensors takes {len(raw)} bytes, more than the "
            f"{MAX_HEADER_BYTES} that safetensors allows; choose smaller parts (--max-part-size)"
        )
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _brief(name: str) -> str:
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}… ({len(name)} characters)"


def _shape(shape: Shape) -> str:
    return str([*shape[:_AXES]])[:-1] + (f", … {len(shape)} axes]" if len(shape) > _AXES else "]")


def _refuse_duplicates(raw: bytes, fault: Callable[..., HeaderError]) -> None:
    """Raise if a name, or a key of one entry, is there twice, or a number is written as -0."""

    def once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) != len(pairs):
            raise fault("the header names it twice", first_repeated([name for name, _ in pairs]))
        return found

    def natural(digits: str) -> int:
        if digits.startswith("-") or len(digits) > len(str(_MAX_INT)):
            raise fault(f"{digits[:32]} is no size or offset, expected 0 to {_MAX_INT}")
        return int(digits)

    try:
        json.loads(raw, object_pairs_hook=once, parse_int=natural)
    except (RecursionError, UnicodeDecodeError):
        raise fault("the header is not the JSON of safetensors") from None
