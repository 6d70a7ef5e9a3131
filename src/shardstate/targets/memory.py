"""Tensors in memory: contiguous numpy arrays of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardstate.catalog import Tensors
from shardstate.coalesce import Piece, Read
from shardstate.dtypes import DTYPES, numpy_dtype
from shardstate.errors import InputError
from shardstate.targets.base import transfer
from shardstate.targets.hashing import TensorHasher


class MemoryTarget:
    """The tensors of one plan; `digests=True` hashes their blocks while they arrive.

    `arrays` maps name → array of the tensor's shape; packed types are flat arrays of uint8.
    """

    def __init__(self, tensors: Tensors, *, digests: bool) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._bytes: list[np.ndarray] = []
        for row, name in enumerate(tensors.names):
            dtype = DTYPES[tensors.dtypes[row]]
            shape = (tensors.nbytes(row),) if dtype.packed else tensors.shapes[row]
            try:
                array = np.empty(shape, dtype=numpy_dtype(dtype.tag))
            except ValueError as error:
                raise InputError(
                    f"{name}: shape {list(shape)} is more than numpy can hold: {error}", tensor=name
                ) from None
            self.arrays[name] = array
            self._bytes.append(array.reshape(-1).view(np.uint8))
        self._hashers = [TensorHasher(len(each)) for each in self._bytes] if digests else None

    def direct(self, piece: Piece) -> memoryview | None:
        run = piece.dest_run
        if run is None or not piece.source_run or piece.source_dtype != piece.dest_dtype:
            return None
        return self._bytes[piece.dest][run[0] : run[1]].data

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        for piece in read.pieces:
            if staged is not None or piece.value is not None:
                transfer(piece, read, staged, self._bytes[piece.dest])
            if self._hashers is not None and (run := piece.dest_run) is not None:
                values = self._bytes[piece.dest][run[0] : run[1]]
                self._hashers[piece.dest].update(run[0], values)

    def stop(self) -> None:
        for hasher in self._hashers or ():
            hasher.stop()

    def blocks(self, row: int) -> Sequence[str]:
        """Return the digests of a tensor's blocks, once all has arrived."""
        assert self._hashers is not None
        return self._hashers[row].blocks()
