"""One table of element types: safetensors tag, width, numpy and torch names.

Elements narrower than a byte have no numpy type here: they are counted and stored as packed
bytes (`unit` is `U8`), and whatever splits them must do so on whole bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type of the safetensors format."""

    tag: str  # as in a safetensors header
    bits: int  # width of one element
    numpy: str  # name in numpy or ml_dtypes; "uint8" where elements are packed
    torch: str | None  # attribute of the module torch; None where torch 2.13 has none
    floating: bool = False  # a plain float of 16 bits or more: what `--dtype` converts
    # Bytes of one element; 1 for packed types, whose unit is the byte. Asked for millions of times.
    itemsize: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", max(1, self.bits // 8))

    @property
    def packed(self) -> bool:
        """Whether several elements share a byte."""
        return self.bits < 8

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` elements; ValueError where they do not fill whole bytes."""
        bits = elements * self.bits
        if bits % 8:
            raise ValueError(f"{elements} elements of {self.bits} bits do not fill whole bytes")
        return bits // 8


_ALL = (
    Dtype("F64", 64, "float64", "float64", True),
    Dtype("F32", 32, "float32", "float32", True),
    Dtype("F16", 16, "float16", "float16", True),
    Dtype("BF16", 16, "bfloat16", "bfloat16", True),
    Dtype("I64", 64, "int64", "int64"),
    Dtype("I32", 32, "int32", "int32"),
    Dtype("I16", 16, "int16", "int16"),
    Dtype("I8", 8, "int8", "int8"),
    Dtype("U64", 64, "uint64", "uint64"),
    Dtype("U32", 32, "uint32", "uint32"),
    Dtype("U16", 16, "uint16", "uint16"),
    Dtype("U8", 8, "uint8", "uint8"),
    Dtype("BOOL", 8, "bool", "bool"),
    Dtype("C64", 64, "complex64", "complex64"),
    Dtype("F8_E4M3", 8, "float8_e4m3fn", "float8_e4m3fn"),
    Dtype("F8_E5M2", 8, "float8_e5m2", "float8_e5m2"),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu", "float8_e8m0fnu"),
    Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float8_e5m2fnuz"),
    Dtype("F6_E2M3", 6, "uint8", None),
    Dtype("F6_E3M2", 6, "uint8", None),
    Dtype("F4", 4, "uint8", "float4_e2m1fn_x2"),
)
DTYPES = MappingProxyType({d.tag: d for d in _ALL})  # by tag

# What `--dtype` says → the tag that every plain float becomes ("keep": none).
CAST_NAMES = MappingProxyType({"keep": None, "bf16": "BF16", "f16": "F16", "f32": "F32"})


@cache
def numpy_dtype(tag: str) -> np.dtype[Any]:
    """Return the numpy type of `tag`; ml_dtypes supplies what numpy itself lacks."""
    name = DTYPES[tag].numpy
    return np.dtype(getattr(ml_dtypes, name, name))


def cast_array(values: np.ndarray, tag: str) -> np.ndarray:
    """Return `values` as `tag`, equal to torch's conversion for all that is not NaN.

    Between plain floats only. NaN stays NaN. float64 goes through float32, as in torch, so that
    rounding happens twice there and here.
    """
    want = numpy_dtype(tag)
    if values.dtype == want:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype.itemsize == 8 or (values.dtype.itemsize == 2 and want.itemsize == 2):
            values = values.astype(np.float32)
        return values.astype(want)
