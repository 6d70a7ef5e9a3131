from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import catalog_in_memory
from shardstate.catalog import (
    INDEX_NAME,
    Tensor,
    catalog_of,
    is_file_name,
    merge_catalogs,
    parse_index,
)
from shardstate.dtypes import DTYPES
from shardstate.errors import CatalogError
from shardstate.header import Header, parse_header, serialise_header

Entry = tuple[str, int, Header]


def entry(file: str, *tensors: tuple[str, str, tuple[int, ...]]) -> Entry:
    """Return a file as `catalog_of` takes it."""
    sized = [(n, d, s, DTYPES[d].nbytes(int(np.prod(s, dtype=int)))) for n, d, s in tensors]
    raw = serialise_header(sized, metadata={}, align=1)
    size = len(raw) + sum(nbytes for *_, nbytes in sized)
    return file, size, parse_header(raw[8:], file=file, file_bytes=size)


A = entry("a.safetensors", ("x", "F32", (2, 3)), ("y", "U8", ()))
B = entry("b.safetensors", ("z", "BF16", (0,)))


def test_files_come_by_name_and_tensors_by_offset() -> None:
    catalog = catalog_of([B, A], weight_map=None)
    at = A[2].data_begin
    expected = [
        Tensor("x", "F32", (2, 3), "a.safetensors", at, at + 24),
        Tensor("y", "U8", (), "a.safetensors", at + 24, at + 25),
        Tensor("z", "BF16", (0,), "b.safetensors", B[1], B[1]),
    ]
    assert expected == list(catalog)
    assert len(catalog) == 3
    assert (("a.safetensors", "b.safetensors"), (A[1], B[1])) == (catalog.files, catalog.file_bytes)
    assert catalog.row == {"x": 0, "y": 1, "z": 2}


def test_a_catalog_of_no_files_is_empty() -> None:
    assert list(catalog_of([], weight_map=None)) == []
    assert list(merge_catalogs([])) == []


def test_a_tensor_in_two_files_needs_an_index() -> None:
    other = entry("c.safetensors", ("x", "F32", (2, 3)), ("w", "U8", (1,)))
    with pytest.raises(CatalogError) as error:
        catalog_of([A, other], weight_map=None)
    assert str(error.value).startswith("x: is in a.safetensors and in c.safetensors; remove one")
    assert (error.value.file, error.value.tensor) == ("c.safetensors", "x")


def test_the_index_decides_between_two_files() -> None:
    other = entry("c.safetensors", ("x", "F16", (9,)), ("w", "U8", (1,)))
    catalog = catalog_of([A, other], weight_map={"x": "c.safetensors", "y": "a.safetensors"})
    expected = [("y", "a.safetensors"), ("x", "c.safetensors"), ("w", "c.safetensors")]
    assert expected == [(tensor.name, tensor.file) for tensor in catalog]
    assert [tensor.dtype for tensor in catalog] == ["U8", "F16", "U8"]


def test_a_tensor_that_the_index_names_must_be_in_its_file() -> None:
    with pytest.raises(CatalogError) as error:
        catalog_of([A, B], weight_map={"z": "a.safetensors", "q": "z.safetensors", "x": A[0]})
    assert "names q in z.safetensors, which does not hold it (and 1 more)" in str(error.value)
    assert (error.value.file, error.value.tensor) == (INDEX_NAME, "q")


@given(st.lists(st.integers(1, 3), max_size=4), st.data())
def test_merged_catalogs_hold_the_tensors_of_all(counts: list[int], data: st.DataObject) -> None:
    catalogs = []
    for i, count in enumerate(counts):
        tensors = [(f"{i}.{j}", "I16", (j,)) for j in range(data.draw(st.integers(1, 4)))]
        catalog, _ = catalog_in_memory(tensors, files=count)
        renamed = tuple(f"{i}-{name}" for name in catalog.files)
        catalogs.append(type(catalog)(**{**vars(catalog), "files": renamed}))
    merged = merge_catalogs(catalogs)
    assert [tensor for catalog in catalogs for tensor in catalog] == list(merged)
    assert sum(counts) == len(merged.files)
    assert (np.int32, np.int64) == (merged.file.dtype, merged.begin.dtype)


def test_an_index_is_read() -> None:
    data = b'{"metadata":{"total_size":8},"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}'
    expected = {"a": "x.safetensors", "b": "y.safetensors"}
    assert expected == parse_index(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"weight_map":{"a":1}}',
        b'{"weight_map":[]}',
        b'{"weight_map":{"\xff":"a"}}',
        b'{"weight_map":' + b"[" * 100_000,
    ],
)
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(CatalogError, match="expected a weight_map") as error:
        parse_index(data)
    assert error.value.file == INDEX_NAME


def test_an_index_without_tensors_is_refused() -> None:
    with pytest.raises(CatalogError, match="names no tensor"):
        parse_index(b'{"weight_map":{}}')


bad_names = ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0", "a\n", "\x1b[2J", "ä" * 128]


@pytest.mark.parametrize("name", bad_names)
def test_an_index_cannot_lead_out_of_its_directory(name: str) -> None:
    with pytest.raises(CatalogError, match="which is no plain file name") as error:
        parse_index(json.dumps({"weight_map": {"a": name}}).encode())
    assert error.value.tensor == "a"


@pytest.mark.parametrize("name", ["a", "...", ".a", "a b", "ä" * 127, "x" * 255, "a..b", "-", "~"])
def test_plain_names_are_file_names(name: str) -> None:
    assert is_file_name(name)


@given(st.text())
def test_a_file_name_is_one_component(name: str) -> None:
    if is_file_name(name):
        assert [name] == name.split("/")
        assert name not in ("", ".", "..")
        assert len(name.encode(errors="replace")) < 256
        assert name.isascii() is False or not name.startswith("\0")
