from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from shardstate.dtypes import CAST_NAMES, DTYPES, cast_array, numpy_dtype

PLAIN = ("F64", "F32", "F16", "BF16")
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def torch_cast(bits: np.ndarray, source: str, dest: str) -> np.ndarray:
    """Return the bits that torch makes of `bits`."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}
    values = torch.from_numpy(bits.view(signed[bits.itemsize])).view(torch_type(source))
    cast = values.to(torch_type(dest))
    return cast.view(getattr(torch, f"int{DTYPES[dest].bits}")).numpy().view(BITS[dest])


def torch_type(tag: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[tag].torch or "")
    return found


def is_nan(bits: np.ndarray, tag: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling ones make ml_dtypes warn
        return np.isnan(bits.view(numpy_dtype(tag)))


def check(bits: np.ndarray, source: str, dest: str) -> None:
    """Assert that a cast gives torch's bits, but for NaN, which stays one."""
    expected = torch_cast(bits, source, dest)
    actual = cast_array(bits.view(numpy_dtype(source)), dest).view(BITS[dest])
    nan = is_nan(bits, source)
    assert expected[~nan].tobytes() == actual[~nan].tobytes()
    assert nan.tobytes() == is_nan(actual, dest).tobytes()


def telling_floats() -> np.ndarray:
    """Return bits of float32 at and beside what 16-bit types hold, their middles, and the ends."""
    every = np.arange(1 << 16, dtype=np.uint32)
    halves = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    brains = every << 16
    # Middles: where the next bit is set and all others are clear, ties go to even.
    middles = [halves | 1 << 12, brains | 1 << 15, halves & ~np.uint32(0x1FFF) | 0x1000]
    exact = np.concatenate([halves, brains, *middles])
    tiny = np.arange(1 << 12, dtype=np.uint32)  # subnormals of float32
    ends = np.float32([65504, 65519, 65520, 65535, 3.4e38, np.inf, 2**-24, 2**-25, 2**-126])
    positive = np.concatenate([exact, exact + 1, exact - 1, tiny, ends.view(np.uint32)])
    return np.concatenate([positive, positive | 1 << 31])


def test_every_tag_of_safetensors_is_in_the_table() -> None:
    header = b'{"x":{"dtype":"?","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(SafetensorError) as error:
        deserialize(len(header).to_bytes(8, "little") + header)
    expected = set(re.findall(r"`([A-Z0-9_]+)`", str(error.value).partition("expected")[2]))
    assert len(expected) > 15
    assert expected == set(DTYPES)


@pytest.mark.parametrize("tag", DTYPES)
def test_widths_are_those_of_numpy_and_torch(tag: str) -> None:
    dtype = DTYPES[tag]
    assert dtype.itemsize == numpy_dtype(tag).itemsize
    assert dtype.packed == (dtype.bits < 8)
    if dtype.torch is not None:
        assert dtype.itemsize == torch_type(tag).itemsize
        assert dtype.packed or torch_type(tag).is_floating_point == ("F" in tag)


@pytest.mark.parametrize("tag", [tag for tag, dtype in DTYPES.items() if dtype.bits == 8])
def test_types_of_one_byte_mean_the_same_in_numpy_and_torch(tag: str) -> None:
    every = np.arange(2 if tag == "BOOL" else 256, dtype=np.uint8)
    expected = torch.from_numpy(every).view(torch_type(tag)).to(torch.float64).numpy()
    actual = every.view(numpy_dtype(tag)).astype(np.float64)
    np.testing.assert_array_equal(expected, actual)


def test_bytes_of_packed_types_are_whole_or_refused() -> None:
    assert [
        DTYPES["F4"].nbytes(4),
        DTYPES["F6_E2M3"].nbytes(4),
        DTYPES["F4"].nbytes(0),
    ] == [2, 3, 0]
    with pytest.raises(ValueError, match="3 elements of 4 bits do not fill whole bytes"):
        DTYPES["F4"].nbytes(3)
    with pytest.raises(ValueError, match="2 elements of 6 bits do not fill whole bytes"):
        DTYPES["F6_E3M2"].nbytes(2)


def test_casts_name_plain_floats() -> None:
    plain = {tag for tag, dtype in DTYPES.items() if dtype.floating}
    assert plain == set(PLAIN)
    assert plain >= {tag for tag in CAST_NAMES.values() if tag is not None}


@pytest.mark.parametrize("dest", PLAIN)
@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_every_16_bit_float_casts_as_in_torch(source: str, dest: str) -> None:
    check(np.arange(1 << 16, dtype=np.uint16), source, dest)


@pytest.mark.parametrize("dest", PLAIN)
def test_float32_at_every_tie_and_end_casts_as_in_torch(dest: str) -> None:
    check(telling_floats(), "F32", dest)


@pytest.mark.parametrize("dest", PLAIN)
def test_float64_beside_every_float32_of_note_casts_as_in_torch(dest: str) -> None:
    floats = telling_floats().view(np.float32)
    with np.errstate(invalid="ignore"):
        wide = floats.astype(np.float64).view(np.uint64)
    # A bit below the last of float32: where rounding once and rounding twice differ.
    check(np.concatenate([wide, wide + 1, wide - 1, wide | 1 << 28]), "F64", dest)


@pytest.mark.parametrize("dest", PLAIN)
@given(st.lists(st.floats(), min_size=1))
def test_any_float64_casts_as_in_torch(dest: str, values: list[float]) -> None:
    check(np.array(values).view(np.uint64), "F64", dest)


@pytest.mark.parametrize("dest", PLAIN)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_any_float32_casts_as_in_torch(dest: str, values: list[int]) -> None:
    check(np.array(values, dtype=np.uint32), "F32", dest)


@pytest.mark.parametrize("tag", DTYPES)
def test_a_cast_to_the_same_type_keeps_the_bits(tag: str) -> None:
    values = np.arange(240, dtype=np.uint8).view(numpy_dtype(tag))
    assert values.tobytes() == cast_array(values, tag).tobytes()


def test_overflow_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        casts = [cast_array(np.array([1e300, -1e300]), tag) for tag in ("F32", "F16", "BF16")]
    assert [[np.inf, -np.inf]] * 3 == [cast.astype(np.float64).tolist() for cast in casts]
