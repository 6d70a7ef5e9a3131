"""Rank files: written in one pass, hashed on the way, visible only when whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from shardstate.coalesce import ASSEMBLY_BYTES, Read
from shardstate.digest import BLOCK_BYTES, rank_file_digest
from shardstate.manifest import PartEntry
from shardstate.parts import PartFile
from shardstate.storage import Output, Writable
from shardstate.targets.base import Assembly, Target, moved
from shardstate.targets.hashing import TensorHasher

# Neighbours in one file go out in one call, up to this: a model has thousands of small tensors.
_WRITE_BYTES = 2 * BLOCK_BYTES


class _Open:
    """A part while it is written."""

    __slots__ = ("hashers", "output", "part", "remaining")

    def __init__(self, part: PartFile, output: Output) -> None:
        self.part, self.output = part, output
        ends = (*part.begins, part.nbytes)[1:]
        self.hashers = [TensorHasher(e - b) for b, e in zip(part.begins, ends, strict=True)]
        self.remaining = part.nbytes

    def stop(self) -> None:
        """Let every thread that waits for earlier bytes give up."""
        for hasher in self.hashers:
            hasher.stop()
        self.output.stop()


class FilesTarget(Target):
    """Writes the parts of several ranks at once; `finished` hears of each that became visible.

    Slot i of the plans writes `parts[i]`. A part is opened when its first byte comes, fsynced and
    renamed as soon as its last one is written, while others go on. On leaving the context what is
    unfinished is discarded. Segments are assembled in `assembly_bytes` of memory, at most.
    """

    def __init__(
        self,
        storage: Writable,
        parts: Sequence[Sequence[PartFile]],
        finished: Callable[[PartFile, PartEntry], None],
        assembly_bytes: int = ASSEMBLY_BYTES,
    ) -> None:
        self._storage, self._parts, self._finished = storage, parts, finished
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._stopped = False
        self._assemblies = [Assembly(assembly_bytes // len(parts)) for _ in parts]
        # Row of a slot's tensors → its part, the tensor's number in it, its first byte.
        self._places = [
            {
                row: (part, i, begin)
                for part in each
                for i, (row, begin) in enumerate(zip(part.rows, part.begins, strict=True))
            }
            for each in parts
        ]

    def __enter__(self) -> FilesTarget:
        # No piece ever comes for a part without data.
        for part in (part for each in self._parts for part in each):
            if part.nbytes == len(part.header):
                self._opened(part)
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open.values():
            opened.output.discard()

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        pending: list[memoryview] = []
        opened, begin, end = None, 0, 0
        for piece in read.pieces:
            part, number, first = self._places[piece.slot][piece.dest]
            into = self._opened(part)
            if piece.segment is not None:
                assembly = self._assemblies[piece.slot]
                whole = assembly.put(piece, read, staged)
                if whole is not None:
                    into.hashers[number].update(piece.segment.begin, whole)
                    self._write(into, first + piece.segment.begin, [whole.data])
                    del whole
                    assembly.release(piece.segment)
                continue
            run = piece.dest_run
            assert run is not None, "pieces in destination order are runs, or parts of a segment"
            values = moved(piece, read, staged)
            into.hashers[number].update(run[0], values)
            if into is not opened or first + run[0] != end or first + run[1] - begin > _WRITE_BYTES:
                if opened is not None:
                    self._write(opened, begin, pending)
                pending, opened, begin = [], into, first + run[0]
            pending.append(values.data)
            end = first + run[1]
        if opened is not None:
            self._write(opened, begin, pending)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            opened = list(self._open.values())
        for part in opened:
            part.stop()
        for assembly in self._assemblies:
            assembly.stop()

    def _opened(self, part: PartFile) -> _Open:
        with self._lock:
            if (opened := self._open.get(part.name)) is not None:
                return opened
            opened = _Open(part, self._storage.create(part.name, part.nbytes))
            self._open[part.name] = opened
            if self._stopped:  # nobody will bring the bytes that others wait for
                opened.stop()
        self._write(opened, 0, [memoryview(part.header)])
        return opened

    def _write(self, opened: _Open, begin: int, views: Sequence[memoryview]) -> None:
        opened.output.write(begin, views)
        with self._lock:
            opened.remaining -= sum(view.nbytes for view in views)
            done = opened.remaining == 0
        if done:
            part = opened.part
            blocks = tuple(hasher.blocks() for hasher in opened.hashers)
            opened.output.publish()
            header = part.header_digest
            entry = PartEntry(
                part.name, part.nbytes, header, rank_file_digest(header, blocks), blocks
            )
            opened.hashers = []  # tens of thousands of tensors; nothing more comes for them
            self._finished(part, entry)
