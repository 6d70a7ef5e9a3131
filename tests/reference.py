"""Checkpoints in memory, and the slowest correct way to carry out a plan: one index at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np
from hypothesis import strategies as st

from shardstate.catalog import Catalog, Tensors
from shardstate.dtypes import DTYPES, cast_array, numpy_dtype
from shardstate.layout import Move, Shape
from shardstate.plan import Plan
from shardstate.sharding import Kind, KvHeads, Replicate, Split, Vocabulary

Pairs = list[tuple[int, int]]


def offsets(offset: int, loops: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return the elements of a region in the order it is walked."""
    found = np.array([offset], dtype=np.int64)
    for size, stride in loops:
        found = (found[:, None] + np.arange(size) * stride).reshape(-1)
    return found


def sides(move: Move) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements that a move reads, and those that it writes, in step."""
    return (
        offsets(move.source, ((n, s) for n, s, _ in move.loops)),
        offsets(move.dest, ((n, d) for n, _, d in move.loops)),
    )


def pairs(*moves: Move) -> Pairs:
    """Return what moves do as sorted pairs (source, destination)."""
    return sorted(
        pair
        for move in moves
        for pair in zip(*(side.tolist() for side in sides(move)), strict=True)
    )


def catalog_in_memory(
    tensors: Sequence[tuple[str, str, Shape]], *, files: int = 1
) -> tuple[Catalog, dict[str, bytes]]:
    """Return a catalog of (name, dtype, shape) and its files, full of bytes that repeat nowhere."""
    names = tuple(f"{i}.safetensors" for i in range(files))
    contents = {name: bytearray(b"header" * (i + 1)) for i, name in enumerate(names)}
    random = np.random.default_rng(len(tensors))
    place, begin = [], []
    for i, (_, dtype, shape) in enumerate(tensors):
        place.append(i * files // len(tensors))
        data = contents[names[place[-1]]]
        begin.append(len(data))
        data += random.bytes(DTYPES[dtype].nbytes(prod(shape)))
    catalog = Catalog(
        tuple(name for name, _, _ in tensors),
        tuple(dtype for _, dtype, _ in tensors),
        tuple(shape for _, _, shape in tensors),
        names,
        tuple(len(contents[name]) for name in names),
        np.array(place, dtype=np.int32),
        np.array(begin, dtype=np.int64),
    )
    return catalog, {name: bytes(data) for name, data in contents.items()}


def stored(tensors: Tensors, values: Mapping[str, bytes], file: str) -> tuple[Catalog, bytes]:
    """Return what a plan made as a checkpoint of one file."""
    data = b"".join(values[name] for name in tensors.names)
    sizes = [tensors.nbytes(row) for row in range(len(tensors))]
    catalog = Catalog(
        tensors.names,
        tensors.dtypes,
        tensors.shapes,
        (file,),
        (len(data),),
        np.zeros(len(tensors), dtype=np.int32),
        np.cumsum([0, *sizes])[:-1].astype(np.int64),
    )
    return catalog, data


def carry_out(
    plan: Plan, files: Mapping[str, bytes], into: Mapping[str, bytearray] | None = None
) -> dict[str, bytes]:
    """Return the bytes of each tensor that `plan` makes, on top of `into` where that is given."""
    made = [
        np.frombuffer(into[name], np.uint8).copy()
        if into is not None
        else np.full(plan.tensors.nbytes(row), 0xA5, np.uint8)
        for row, name in enumerate(plan.tensors.names)
    ]
    for fill in plan.fills:
        at = offsets(fill.region.offset, fill.region.loops)
        value = np.frombuffer(fill.value, numpy_dtype(fill.dtype))
        made[fill.dest].view(numpy_dtype(fill.dtype))[at] = value
    for literal in plan.literals:
        data = np.frombuffer(literal.data, np.uint8)
        made[literal.dest][literal.begin : literal.begin + len(data)] = data
    for copy in plan:
        tensor = plan.catalog.tensor(copy.source)
        stored_bytes = np.frombuffer(files[tensor.file][tensor.begin : tensor.end], np.uint8)
        source, dest = sides(copy.move)
        values = stored_bytes.view(numpy_dtype(copy.source_dtype))[source]
        made[copy.dest].view(numpy_dtype(copy.dest_dtype))[dest] = cast_array(
            values, copy.dest_dtype
        )
    return {name: array.tobytes() for name, array in zip(plan.tensors.names, made, strict=True)}


def elements(data: bytes, dtype: str, shape: Shape) -> np.ndarray:
    """Return a tensor with one more axis, the bits of an element: packed types have no other."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return bits.reshape(*shape, DTYPES[dtype].bits)


def packed(array: np.ndarray) -> bytes:
    """Return the bytes of `elements`."""
    return np.packbits(array.reshape(-1), bitorder="little").tobytes()


def share_of(array: np.ndarray, kind: Kind, rank: int, world: int) -> np.ndarray:
    """Return what a rank holds of an array, said in numpy's words."""
    match kind:
        case Replicate():
            return array
        case Split(axis, _):
            return np.split(array, world, axis)[rank]
        case KvHeads(heads, axis):
            blocks = np.split(array, min(heads, world), axis)
            return blocks[rank * len(blocks) // world]
        case Vocabulary():
            rows = -len(array) % world
            whole = np.concatenate([array, np.zeros((rows, *array.shape[1:]), array.dtype)])
            return np.split(whole, world)[rank]


@st.composite
def shared_tensors(
    draw: st.DrawFn, world: int, *, dtypes: Sequence[str] = tuple(DTYPES)
) -> tuple[list[tuple[str, str, Shape]], list[Kind]]:
    """Draw tensors and how they are shared, such that `world` ranks can share them."""
    tensors, kinds = [], []
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(dtypes))
        whole = 4 if DTYPES[dtype].packed else 1  # elements that fill whole bytes
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if shape:
            shape[-1] *= whole
        elif whole > 1:
            shape = [whole]
        kind: Kind = draw(
            st.sampled_from([Replicate(), *([Split(0), KvHeads(1), Vocabulary()] if shape else [])])
        )
        match kind:
            case Split():
                axis = draw(st.integers(0, len(shape) - 1))
                unit = draw(st.integers(1, 3)) * (whole if axis == len(shape) - 1 else 1)
                shape[axis] = world * unit * draw(st.integers(0, 2))
                kind = Split(axis, unit)
            case KvHeads():
                axis = draw(st.integers(0, len(shape) - 1))
                heads = draw(
                    st.sampled_from([n for n in range(1, 9) if n % world == 0 or world % n == 0])
                )
                width = draw(st.integers(0, 3)) * (whole if axis == len(shape) - 1 else 1)
                shape[axis] = heads * width
                kind = KvHeads(heads, axis)
            case Vocabulary():
                rows = draw(st.integers(0, 9))
                shape[0] = rows * whole * world if len(shape) == 1 and whole > 1 else rows
            case Replicate():
                pass
        tensors.append((f"layers.{i}.weight", dtype, tuple(shape)))
        kinds.append(kind)
    return tensors, kinds
