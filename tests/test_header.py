from __future__ import annotations

import json
import re
import time
from math import prod
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from shardstate.dtypes import DTYPES
from shardstate.errors import HeaderError
from shardstate.header import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    header_length,
    parse_header,
    serialise_header,
)
from shardstate.layout import Shape

Entry = tuple[str, str, Shape, int]
ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    found = []
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if DTYPES[dtype].packed:
            shape = [*shape, 4]
        found.append((name, dtype, tuple(shape), DTYPES[dtype].nbytes(prod(shape))))
    return found


metadata = st.dictionaries(names, names, max_size=2)


def parse(raw: bytes, data_bytes: int) -> Any:
    return parse_header(raw, file="x.safetensors", file_bytes=PREFIX_BYTES + len(raw) + data_bytes)


def agrees_with_safetensors(raw: bytes, data_bytes: int) -> bool:
    """Assert that what we accept safetensors accepts as the same tensors; tell whether we do."""
    data = bytes(i % 251 for i in range(data_bytes))
    blob = len(raw).to_bytes(PREFIX_BYTES, "little") + raw + data
    try:
        header = parse(raw, data_bytes)
    except HeaderError:
        return False
    rows = zip(header.names, header.dtypes, header.shapes, header.begins, header.ends, strict=True)
    actual = {name: (dtype, [*shape], blob[b:e]) for name, dtype, shape, b, e in rows}
    expected = {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(blob)
    }
    assert expected == actual
    return True


@given(entries(), metadata, st.sampled_from([1, 8, 4096]))
def test_a_header_survives_the_round_trip(
    tensors: list[Entry], said: dict[str, str], align: int
) -> None:
    blob = serialise_header(tensors, metadata=said, align=align)
    data_bytes = sum(nbytes for *_, nbytes in tensors)
    length = header_length(blob, file="f", file_bytes=len(blob) + data_bytes)
    assert len(blob) == PREFIX_BYTES + length
    header = parse(blob[PREFIX_BYTES:], data_bytes)
    assert len(blob) % align == 0
    assert len(blob) == header.data_begin
    assert said == header.metadata
    assert {t[0]: t[1:3] for t in tensors} == {
        name: (dtype, shape)
        for name, dtype, shape in zip(header.names, header.dtypes, header.shapes, strict=True)
    }
    assert agrees_with_safetensors(blob[PREFIX_BYTES:], data_bytes)
    # The order of tensors that share an offset, because some are empty, is nobody's promise.
    assert [t[0] for t in tensors if t[3]] == [
        name
        for name, begin, end in zip(header.names, header.begins, header.ends, strict=True)
        if end > begin
    ]


def test_literal_bytes_of_a_header() -> None:
    raw = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    expected = b"\x90\0\0\0\0\0\0\0" + raw.ljust(144)
    actual = serialise_header(
        [("a", "BF16", (2, 3), 12), ("b", "U8", (), 1)], metadata={"format": "pt"}, align=8
    )
    assert expected == actual


@settings(max_examples=300)
@given(entries(), metadata, st.data())
def test_what_safetensors_refuses_is_refused_after_any_edit(
    tensors: list[Entry], said: dict[str, str], data: st.DataObject
) -> None:
    raw = bytearray(serialise_header(tensors, metadata=said, align=1)[PREFIX_BYTES:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        until = data.draw(st.integers(at, min(len(raw), at + 3)))
        tokens = [b"", b"0", b"-0", b"-1", b".0", b"1e0", b'"', b"\\", b"{}", b"[]", b",", b" "]
        raw[at:until] = data.draw(
            st.sampled_from([*tokens, b"null", b"\xff", b"\\u0061", b"\\ud800", b"4", b"a"])
        )
    agrees_with_safetensors(bytes(raw), sum(nbytes for *_, nbytes in tensors))


@settings(max_examples=200)
@given(st.data())
def test_what_safetensors_refuses_is_refused_for_any_tokens(data: st.DataObject) -> None:
    number = st.sampled_from(["0", "1", "4", "8", "-0", "4.0", "9223372036854775808", "null"])
    pair = st.lists(number, min_size=1, max_size=3).map(lambda n: f"[{','.join(n)}]")
    value = {
        "dtype": st.sampled_from(['"F32"', '"U8"', '"f32"', '"F4"', "5"]),
        "shape": pair,
        "data_offsets": st.one_of(st.sampled_from(["[0,4]", "[4,8]", "[0,0]"]), pair),
        "extra": number,
    }
    keys = st.lists(st.sampled_from([*list(value)[:3] * 4, "extra"]), min_size=2, max_size=4)
    parts = []
    for name in data.draw(st.lists(st.sampled_from(["a", "\\u0061", "b", "__metadata__"]))):
        items = [f'"{key}":{data.draw(value[key])}' for key in data.draw(keys)]
        body = f"{{{','.join(items)}}}"
        parts.append(f'"{name}":{data.draw(st.sampled_from([body, body, ONE, "{}", "1"]))}')
    agrees_with_safetensors(
        f"{{{','.join(parts)}}}".encode(), data.draw(st.sampled_from([0, 4, 8]))
    )


@pytest.mark.parametrize(
    "raw",
    [
        '{"a":5,"a":ONE}',
        '{"a":ONE,"a":ONE}',
        '{"a":ONE,"\\u0061":ONE}',
        '{"a\\n":ONE,"\\u0061\\n":ONE}',
        '{"__metadata__":5,"__metadata__":{},"a":ONE}',
        '{"__metadata__":{},"__metadata__":{},"a":ONE}',
        '{"__metadata__":{"a":"1","\\u0061":"2"},"a":ONE}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[7],"shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offset\\u0073":[0,4]}}',
    ],
)
def test_nothing_is_named_twice(raw: str) -> None:
    with pytest.raises(HeaderError, match="the header names it twice"):
        parse(raw.replace("ONE", ONE).encode(), 4)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b',"a":ONE}',
        b'{"a":' + b"[" * 400 + b"]" * 400 + b',"a":ONE}',
        b'{"\\u0061":' + b"9" * 5000 + b',"a":ONE}',
        b'{"a":"\xff","a":ONE}',
        b'{"a":-0,"a":ONE}',
    ],
)
def test_what_hides_behind_a_later_entry_of_its_name_is_refused(raw: bytes) -> None:
    with pytest.raises(HeaderError):
        parse(raw.replace(b"ONE", ONE.encode()), 4)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}',
        '{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}',
        '{"dtype":"U8","shape":[0],"data_offsets":[0,-0]}',
    ],
)
def test_minus_zero_is_no_size(entry: str) -> None:
    with pytest.raises(HeaderError, match="-0 is no size or offset, expected 0 to"):
        parse(f'{{"a":{entry}}}'.encode(), 0)


def test_an_entry_has_no_other_keys() -> None:
    with pytest.raises(HeaderError, match="a: Object contains unknown field `x`"):
        parse(f'{{"a":{ONE[:-1]},"x":1}}}}'.encode(), 4)


def test_names_that_look_like_keys_are_names() -> None:
    tensors = [(name, "U8", (1,), 1) for name in ["data_offsets", "dtype", '"', "-0", "\\", ""]]
    blob = serialise_header(tensors, metadata={"shape": "-0"}, align=1)
    assert [name for name, *_ in tensors] == list(parse(blob[PREFIX_BYTES:], 6).names)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"dtype":"Q4","shape":[4],"data_offsets":[0,4]}', "unknown dtype 'Q4'; known are F64, "),
        (
            '{"dtype":"F32","shape":[1],"data_offsets":[4,8]}',
            "begins at data byte 4, expected 0: leaves a gap before it",
        ),
        (
            '{"dtype":"F32","shape":[2],"data_offsets":[0,4]}',
            r"shape \[2\] of F32 takes 8 bytes, and its offsets hold 4",
        ),
        (
            '{"dtype":"F4","shape":[3],"data_offsets":[0,2]}',
            r"shape \[3\] of F4 takes 1.5 bytes, and its offsets hold 2",
        ),
        ('{"dtype":"F32","shape":[1],"data_offsets":[0]}', "Expected `array` of length 2"),
        (
            '{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}',
            r"Expected `int` >= 0 - at `\$.shape",
        ),
        ('{"dtype":"F32","shape":[1]}', "missing required field `data_offsets`"),
        (
            '{"dtype":"F32","shape":[4611686018427387904,8,0],"data_offsets":[0,0]}',
            r"overflows, expected sizes below 2\*\*63",
        ),
    ],
)
def test_an_error_names_file_and_tensor_and_what_was_expected(entry: str, message: str) -> None:
    with pytest.raises(HeaderError, match=message) as error:
        parse(f'{{"the.name":{entry}}}'.encode(), 4)
    assert str(error.value).startswith("x.safetensors: the.name: ")
    assert (error.value.file, error.value.tensor) == ("x.safetensors", "the.name")


def test_tensors_that_overlap_are_refused() -> None:
    second = '{"dtype":"F32","shape":[1],"data_offsets":[2,6]}'
    with pytest.raises(HeaderError, match="b: begins at data byte 2, expected 4: overlaps"):
        parse(f'{{"a":{ONE},"b":{second}}}'.encode(), 6)


@pytest.mark.parametrize(("data_bytes", "why"), [(3, "truncated"), (5, "belong to no tensor")])
def test_data_that_ends_elsewhere_is_refused(data_bytes: int, why: str) -> None:
    raw = f'{{"a":{ONE}}}'.encode()
    end = PREFIX_BYTES + len(raw)
    message = f"its tensors end at byte {end + 4}, and the file at {end + data_bytes}: .*{why}"
    with pytest.raises(HeaderError, match=message):
        parse(raw, data_bytes)


@given(st.binary(max_size=12), st.integers(0, 200))
@example(bytes(8), 8)
@example(b"\0" * 7 + b"\x80", 1 << 62)
def test_a_prefix_gives_a_length_that_fits_or_an_error(prefix: bytes, more: int) -> None:
    file_bytes = len(prefix) + more
    announced = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    fits = announced <= min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES)
    if len(prefix) >= PREFIX_BYTES and fits:
        assert announced == header_length(prefix, file="f", file_bytes=file_bytes)
        return
    with pytest.raises(HeaderError, match=r"^f: ") as error:
        header_length(prefix, file="f", file_bytes=file_bytes)
    if len(prefix) >= PREFIX_BYTES:
        assert str(announced) in str(error.value) or str(announced + 8) in str(error.value)


def test_the_largest_header_of_safetensors_is_the_largest() -> None:
    longest = MAX_HEADER_BYTES.to_bytes(PREFIX_BYTES, "little")
    assert header_length(longest, file="f", file_bytes=1 << 40) == MAX_HEADER_BYTES
    with pytest.raises(HeaderError, match="announces a header of 100000001 bytes, more than"):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), file="f", file_bytes=1 << 40)


def test_metadata_is_text() -> None:
    for wrong in ('{"a":1}', '{"a":null}', "[]", '"a"'):
        with pytest.raises(HeaderError, match="is not the JSON of safetensors"):
            parse(f'{{"__metadata__":{wrong}}}'.encode(), 0)


@pytest.mark.parametrize("raw", [b"", b"{", b" {}", b"[]", b"null", b"{}{}", b"{}\0", b'{"a":}'])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(HeaderError, match=re.escape("x.safetensors: ")):
        parse(raw, 0)


def test_padding_of_the_header_is_space() -> None:
    blob = serialise_header([], metadata={}, align=64)
    assert blob[PREFIX_BYTES:] == b'{"__metadata__":{}}'.ljust(64 - PREFIX_BYTES)
    assert msgspec.json.decode(blob[PREFIX_BYTES:]) == json.loads(blob[PREFIX_BYTES:])


@pytest.mark.parametrize(
    "grow",
    [
        lambda n: ",".join(f'"{i}":1' for i in range(n)) + ',"0":1',
        lambda n: ",".join('"a":ONE' for _ in range(n)),
        lambda n: ",".join(f'"\\u0061{i}":ONE' for i in range(n)),
        lambda n: f'"{"x" * 20 * n}":1',
        lambda n: f'"a":{{"dtype":"{"x" * 20 * n}","shape":[],"data_offsets":[0,0]}}',
        lambda n: '"a":{"dtype":"U8","shape":[SIZES],"data_offsets":[0,4]}'.replace(
            "SIZES", ",".join(["9223372036854775807"] * n)
        ),
        lambda n: '"a":{"dtype":"U8","shape":[SIZES],"data_offsets":[0,4]}'.replace(
            "SIZES", ",".join(["1"] * n)
        ),
    ],
    ids=["last twice", "all one", "escapes", "long name", "long dtype", "huge shape", "many axes"],
)
def test_a_hostile_header_costs_time_and_an_error_in_proportion(grow: Any) -> None:
    def seconds(n: int) -> float:
        raw = b"{" + grow(n).replace("ONE", ONE).encode() + b"}"
        began = time.perf_counter()
        with pytest.raises(HeaderError) as error:
            parse(raw, 4)
        assert len(str(error.value)) < 2500
        return time.perf_counter() - began

    seconds(100)
    short, long = min(seconds(2_000) for _ in range(3)), seconds(64_000)
    assert long < 32 * 12 * short + 0.05  # 32 × as long; quadratic would be 1,024 ×
