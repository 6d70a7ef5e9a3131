"""Block digests of a tensor whose bytes arrive in pieces, from several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from shardstate.coalesce import Piece, Read
from shardstate.digest import BLOCK_BYTES, block_count
from shardstate.storage import Arrived


class TensorHasher:
    """Digests of the 4 MiB blocks of one tensor.

    A piece that covers whole blocks is hashed at once. One that begins inside a block waits for
    what comes before it, which another thread already holds: reads begin in destination order.
    """

    __slots__ = ("_blocks", "_hashers", "_nbytes", "_position", "_stopped")

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._blocks: list[str | None] = [None] * block_count(nbytes)
        self._position: dict[int, int] = {}  # block → bytes of it that are hashed
        self._hashers: dict[int, blake3] = {}
        self._stopped = False

    def update(self, begin: int, data: np.ndarray) -> None:
        """Hash bytes `[begin, begin + len(data))` of the tensor."""
        end = begin + len(data)
        while begin < end:
            block = begin // BLOCK_BYTES
            first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._nbytes)
            stop = min(end, last)
            part, data = data[: stop - begin], data[stop - begin :]
            if begin == first and stop == last:
                self._blocks[block] = blake3(part.data).hexdigest()
            else:
                self._partial(block, begin - first, part, last - first)
            begin = stop

    def _partial(self, block: int, at: int, part: np.ndarray, size: int) -> None:
        with _CONDITION:
            while self._position.get(block, 0) != at and not self._stopped:
                _CONDITION.wait()
            if self._stopped:
                return
            hasher = self._hashers.setdefault(block, blake3())
        hasher.update(part.data)
        with _CONDITION:
            self._position[block] = at + len(part)
            if at + len(part) == size:
                self._blocks[block] = hasher.hexdigest()
                del self._hashers[block]
            _CONDITION.notify_all()

    def closes(self, at: int) -> bool:
        """Whether a block ends at byte `at` of the tensor."""
        return at % BLOCK_BYTES == 0 or at == self._nbytes

    def put(self, block: int, digest: str) -> None:
        """Take the digest of a whole block."""
        self._blocks[block] = digest

    def stop(self) -> None:
        """Let every thread that waits here give up."""
        with _CONDITION:
            self._stopped = True
            _CONDITION.notify_all()

    @property
    def begun(self) -> bool:
        """Whether anything has arrived, or nothing ever will."""
        return not self._blocks or bool(self._position) or any(self._blocks)

    def blocks(self) -> tuple[str, ...]:
        """Return all digests; every byte must have arrived."""
        found = tuple(block for block in self._blocks if block is not None)
        assert len(found) == len(self._blocks), "digests asked for before all bytes arrived"
        return found


class StoredDigests:
    """Block digests of source tensors, each of which a plan reads whole and once, or not at all."""

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._hashers = [TensorHasher(each) for each in nbytes]
        self._lock = threading.Lock()
        self.seconds = 0.0  # that hashing took, of all threads together

    def update(self, piece: Piece, begin: int, arrived: np.ndarray) -> None:
        """Hash bytes of `piece`; `begin` is where in its file they begin."""
        began = time.perf_counter()
        self._hashers[piece.source].update(begin - piece.base, arrived)
        self._count(began)

    def _count(self, began: float) -> None:
        took = time.perf_counter() - began
        with self._lock:
            self.seconds += took

    def following(self, read: Read, parts: Sequence[memoryview]) -> Arrived:
        """Return what hashes a read while it arrives in `parts`, the memory of each piece.

        Before it leaves the processor's cache; so the way of whole blocks, which all but few
        pieces begin and end with, is short.
        """
        left = [
            (piece.begin - read.begin, piece, part)
            for piece, part in zip(read.pieces, parts, strict=True)
        ]
        left.reverse()
        at = 0  # all before is hashed
        hasher = blake3()

        def arrived(nbytes: int) -> None:
            nonlocal at, hasher
            began = time.perf_counter()
            while left:
                first, piece, part = left[-1]
                begin, end = max(at - first, 0), min(nbytes - first, len(part))
                own = piece.begin - piece.base  # of the piece, in its tensor
                if begin < end:
                    whole = own % BLOCK_BYTES == 0 and len(part) <= BLOCK_BYTES
                    if whole and self._hashers[piece.source].closes(own + len(part)):
                        hasher.update(part[begin:end])
                        if end == len(part):
                            self._hashers[piece.source].put(own // BLOCK_BYTES, hasher.hexdigest())
                            hasher = blake3()
                    else:
                        data = np.frombuffer(part[begin:end], dtype=np.uint8)
                        self._hashers[piece.source].update(own + begin, data)
                if end < len(part):
                    break
                left.pop()
            at = nbytes
            self._count(began)

        return arrived

    def stop(self) -> None:
        """Let every thread that waits give up."""
        for hasher in self._hashers:
            hasher.stop()

    def blocks(self, row: int) -> tuple[str, ...] | None:
        """Return the digests of one source tensor's blocks; None if the plan did not read it."""
        return self._hashers[row].blocks() if self._hashers[row].begun else None


# One for all tensors: threads wait rarely, and a model has tens of thousands of tensors.
_CONDITION = threading.Condition()
