"""Tensors in memory: numpy arrays of their own, or whatever memory the caller has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardstate.buffers import aligned
from shardstate.catalog import Tensors
from shardstate.coalesce import Read
from shardstate.dtypes import DTYPES, numpy_dtype
from shardstate.errors import InputError
from shardstate.storage import Runs
from shardstate.targets.base import Direct, Target, runs_of, transfer
from shardstate.targets.hashing import StoredDigests


def allocate(tensors: Tensors) -> dict[str, np.ndarray]:
    """Return an array for each tensor, with nothing in it yet; packed types as flat uint8."""
    arrays: dict[str, np.ndarray] = {}
    for row, name in enumerate(tensors.names):
        dtype = DTYPES[tensors.dtypes[row]]
        shape = (tensors.nbytes(row),) if dtype.packed else tensors.shapes[row]
        try:
            arrays[name] = aligned(tensors.nbytes(row)).view(numpy_dtype(dtype.tag)).reshape(shape)
        except ValueError as error:
            raise InputError(
                f"{name}: shape {list(shape)} is more than numpy can hold: {error}", tensor=name
            ) from None
    return arrays


class MemoryTarget(Target):
    """Fills `memory`: for each tensor of a plan, the bytes from its first element to its last."""

    def __init__(self, memory: Sequence[np.ndarray], *, digests: StoredDigests | None) -> None:
        self._memory, self._digests = memory, digests

    def direct(self, read: Read) -> Direct | None:
        views: list[memoryview] = []
        parts: list[memoryview] = []  # of the pieces alone
        at = read.begin
        for piece in read.pieces:
            run = piece.direct_run
            if run is None or piece.begin < at:
                return None
            if piece.begin > at:
                views.append(memoryview(bytearray(piece.begin - at)))
            parts.append(self._memory[piece.dest][run[0] : run[1]].data)
            views.append(parts[-1])
            at = piece.end
        return Direct(
            views, None if self._digests is None else self._digests.following(read, parts)
        )

    def runs(self, read: Read) -> Sequence[Runs] | None:
        if self._digests is not None:
            return None
        found: list[Runs] = []
        for piece in read.pieces:
            memory = self._memory[piece.dest]
            # The kernel takes addresses, and does not ask whose they are.
            begin, end = piece.dest_span
            inside = begin >= 0 and end <= len(memory) and memory.flags.writeable
            runs = runs_of(piece, memory.ctypes.data) if inside else None
            if runs is None:
                return None
            found.append(runs)
        return found

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        for piece in read.pieces:
            if staged is not None or piece.value is not None:
                transfer(piece, read, staged, self._memory[piece.dest])
            if self._digests is not None and staged is not None:
                arrived = staged[piece.begin - read.begin : piece.end - read.begin]
                self._digests.update(piece, piece.begin, arrived)

    def stop(self) -> None:
        if self._digests is not None:
            self._digests.stop()
