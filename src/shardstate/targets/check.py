"""Targets that keep nothing: digests of what is stored, and a comparison with what is stored."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardstate.buffers import aligned
from shardstate.catalog import Catalog, Tensors
from shardstate.coalesce import Piece, Read
from shardstate.digest import BLOCK_BYTES
from shardstate.dtypes import DTYPES
from shardstate.storage import Storage
from shardstate.targets.base import Target, moved, spread
from shardstate.targets.hashing import TensorHasher


class DigestTarget(Target):
    """Hashes the tensors of plans; keeps only the digests of their blocks."""

    def __init__(self, tensors: Sequence[Tensors]) -> None:
        self._hashers = [[TensorHasher(t.nbytes(r)) for r in range(len(t))] for t in tensors]

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        for piece in read.pieces:
            run = piece.dest_run
            assert run is not None, "a stored tensor is one run"
            values = moved(piece, read, staged)
            self._hashers[piece.slot][piece.dest].update(run[0], values)

    def stop(self) -> None:
        for hashers in self._hashers:
            for hasher in hashers:
                hasher.stop()

    def blocks(self, slot: int, row: int) -> tuple[str, ...]:
        """Return the digests of a tensor's blocks, once all has arrived."""
        return self._hashers[slot][row].blocks()


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes `[begin, end)` of a tensor that hold something else than the plan puts there."""

    slot: int
    dest: int
    begin: int  # bytes from the tensor's first byte
    end: int


class CompareTarget(Target):
    """Compares what plans make with what is stored under the same names; keeps the differences."""

    def __init__(self, storage: Storage, stored: Sequence[tuple[Tensors, Catalog]]) -> None:
        self._storage = storage
        self._stored = stored
        self._lock = threading.Lock()
        self.differences: list[Difference] = []
        self.bytes_read = 0

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        for piece in read.pieces:
            tensors, catalog = self._stored[piece.slot]
            tensor = catalog.tensor(catalog.row[tensors.names[piece.dest]])
            width = DTYPES[piece.dest_dtype].itemsize
            begin, end = piece.move.dest * width, piece.move.dest_region.end * width
            have = aligned(end - begin)
            self._storage.read_into(tensor.file, tensor.begin + begin, [have.data])
            want = moved(piece, read, staged)
            if piece.dest_run is None:  # what lies between its elements is another piece's
                want = spread(piece, want, have)
            if not np.array_equal(want, have):
                self._note(piece, np.flatnonzero(want != have) + begin)
            with self._lock:
                self.bytes_read += len(have)

    def _note(self, piece: Piece, wrong: np.ndarray) -> None:
        """Keep one difference a block: a damaged tensor must not make millions of them."""
        blocks = wrong // BLOCK_BYTES
        for block in np.unique(blocks):
            inside = wrong[blocks == block]
            found = Difference(piece.slot, piece.dest, int(inside[0]), int(inside[-1]) + 1)
            with self._lock:
                self.differences.append(found)

    def stop(self) -> None:
        pass
