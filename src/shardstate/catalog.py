"""All tensors of a checkpoint, or of one rank, in columns: names, types, shapes, places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import msgspec
import numpy as np

from shardstate.dtypes import DTYPES
from shardstate.errors import CatalogError
from shardstate.header import Header
from shardstate.jsontext import json_fault, shown
from shardstate.layout import Shape

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: bytes `[begin, end)` of `file`."""

    name: str
    dtype: str  # safetensors tag
    shape: Shape
    file: str
    begin: int  # bytes from the start of the file, header included
    end: int


@dataclass(frozen=True)
class Tensors:
    """Names, types and shapes in columns; no places."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # safetensors tags
    shapes: tuple[Shape, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def row(self) -> Mapping[str, int]:
        """Name → row."""
        return {name: i for i, name in enumerate(self.names)}

    def nbytes(self, row: int) -> int:
        """Bytes of the tensor in `row`."""
        return DTYPES[self.dtypes[row]].nbytes(prod(self.shapes[row]))


@dataclass(frozen=True)
class Catalog(Tensors):
    """Stored tensors: what `Tensors` says, and where each one's bytes lie."""

    files: tuple[str, ...]
    file_bytes: tuple[int, ...]  # size of each file, header included
    file: np.ndarray = field(repr=False)  # int32, index into `files`, per tensor
    begin: np.ndarray = field(repr=False)  # int64, bytes from the start of the file, per tensor

    def tensor(self, row: int) -> Tensor:
        """Return the view of one row."""
        begin = int(self.begin[row])
        return Tensor(
            self.names[row],
            self.dtypes[row],
            self.shapes[row],
            self.files[self.file[row]],
            begin,
            begin + self.nbytes(row),
        )

    def __iter__(self) -> Iterator[Tensor]:
        return (self.tensor(row) for row in range(len(self)))


def catalog_of(
    files: Sequence[tuple[str, int, Header]], *, weight_map: Mapping[str, str] | None
) -> Catalog:
    """Return the catalog of `files` (name, bytes, header): files by name, tensors by offset.

    `weight_map` (tensor → file) is the index of a checkpoint in many files: it decides which of two
    files a tensor comes from. Raises `CatalogError` for a tensor that the index names and its file
    lacks, and for one in two files where no index decides.
    """
    ordered = sorted(files, key=lambda each: each[0])
    if weight_map is not None:
        held = {name: set(header.names) for name, _, header in ordered}
        absent = sorted(t for t, f in weight_map.items() if t not in held.get(f, ()))
        if absent:
            first = absent[0]
            raise CatalogError(
                f"{INDEX_NAME}: names {first} in {weight_map[first]}, which does not hold it"
                f"{f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''}; index and files "
                f"do not belong together: fetch the checkpoint again",
                file=INDEX_NAME,
                tensor=first,
            )
    seen: dict[str, int] = {}
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[Shape] = []
    places: list[int] = []
    begins: list[int] = []
    for i, (file, _, header) in enumerate(ordered):
        for name, dtype, shape, begin in zip(
            header.names, header.dtypes, header.shapes, header.begins, strict=True
        ):
            if weight_map is not None and weight_map.get(name, file) != file:
                continue
            if (other := seen.setdefault(name, i)) != i:
                raise CatalogError(
                    f"{name}: is in {ordered[other][0]} and in {file}; remove one of the files, or "
                    f"add the {INDEX_NAME} that says which counts",
                    file=file,
                    tensor=name,
                )
            names.append(name)
            dtypes.append(dtype)
            shapes.append(shape)
            places.append(i)
            begins.append(begin)
    return Catalog(
        tuple(names),
        tuple(dtypes),
        tuple(shapes),
        tuple(name for name, _, _ in ordered),
        tuple(size for _, size, _ in ordered),
        np.array(places, dtype=np.int32),
        np.array(begins, dtype=np.int64),
    )


def placeless(tensors: Tensors) -> Catalog:
    """Return `tensors` as a catalog that lies nowhere: the middle of a composition."""
    nowhere = np.zeros(len(tensors), dtype=np.int64)
    return Catalog(
        tensors.names,
        tensors.dtypes,
        tensors.shapes,
        ("",),
        (0,),
        nowhere.astype(np.int32),
        nowhere,
    )


def merge_catalogs(catalogs: Sequence[Catalog]) -> Catalog:
    """Return one catalog of several whose names and files all differ."""
    offsets = np.cumsum([0, *(len(each.files) for each in catalogs)])
    return Catalog(
        tuple(name for each in catalogs for name in each.names),
        tuple(dtype for each in catalogs for dtype in each.dtypes),
        tuple(shape for each in catalogs for shape in each.shapes),
        tuple(name for each in catalogs for name in each.files),
        tuple(size for each in catalogs for size in each.file_bytes),
        np.concatenate(
            [np.empty(0, np.int32), *(c.file + o for c, o in zip(catalogs, offsets, strict=False))]
        ).astype(np.int32),
        np.concatenate([np.empty(0, np.int64), *(each.begin for each in catalogs)]),
    )


def parse_index(data: bytes) -> dict[str, str]:
    """Return tensor → file name of a `model.safetensors.index.json`."""

    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        if (wrong := json_fault(data)) is not None:
            raise msgspec.DecodeError(wrong)
        weight_map = msgspec.json.decode(data, type=Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CatalogError(
            f"{INDEX_NAME}: {error}; expected a weight_map of tensor names to file names: "
            f"fetch it again",
            file=INDEX_NAME,
        ) from None
    for tensor, name in weight_map.items():
        if not is_file_name(name):
            raise CatalogError(
                f"{INDEX_NAME}: {shown(tensor)} lies in {shown(name)}, which is no plain file name",
                file=INDEX_NAME,
                tensor=tensor,
            )
    if not weight_map:
        raise CatalogError(f"{INDEX_NAME}: names no tensor", file=INDEX_NAME)
    return weight_map


def is_file_name(name: str) -> bool:
    """Whether `name` is one component of a path that names a file of its directory."""
    return (
        bool(name)
        and name not in (".", "..")
        and not any(c in "/\\" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name[:256])
        and len(name.encode(errors="replace")) <= 255
    )
