"""Copies files from one storage to another, each verified by its digests on the way.

A file is read in spans; what the records list of its bytes is compared before they are written. A
span that came wrong is read again. Nothing is visible at the target before all of it was right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardstate.buffers import aligned
from shardstate.coalesce import Piece, Read
from shardstate.digest import BLOCK_BYTES, digest_of
from shardstate.errors import DigestError
from shardstate.header import Header
from shardstate.layout import Move
from shardstate.manifest import PartEntry
from shardstate.storage import Output, Storage, Writable
from shardstate.targets import Target

_SPAN_BYTES = BLOCK_BYTES
_TRIES = 4  # reading what came with a wrong digest


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[begin, end)` of a file, and their digest if one is recorded."""

    begin: int
    end: int
    digest: str | None


@dataclass(frozen=True)
class File:
    """A file to be copied; its spans follow each other from its first byte to its last."""

    name: str
    nbytes: int
    spans: tuple[Span, ...] = field(repr=False)


def rank_file(entry: PartEntry, header: Header) -> File:
    """Return a rank file, with the digests of its header and of its tensors' blocks."""
    spans = [Span(0, header.data_begin, entry.header)]
    tensors = zip(header.begins, header.ends, entry.blocks, strict=True)
    for first, last, blocks in sorted(tensors, key=lambda tensor: tensor[0]):
        for number, digest in enumerate(blocks):
            begin = first + number * BLOCK_BYTES
            spans.append(Span(begin, min(begin + BLOCK_BYTES, last), digest))
    return File(entry.name, entry.bytes, tuple(spans))


def plain_file(name: str, nbytes: int) -> File:
    """Return a file that no digest is recorded of."""
    begins = range(0, nbytes, _SPAN_BYTES)
    spans = (Span(begin, min(begin + _SPAN_BYTES, nbytes), None) for begin in begins)
    return File(name, nbytes, tuple(spans))


def reads_of_files(files: Sequence[File]) -> list[Read]:
    """Return the reads of all bytes of `files`, one after the other: whole spans each."""
    reads = []
    for slot, file in enumerate(files):
        for group in _groups(file.spans):
            begin, end = group[0].begin, group[-1].end
            move = Move(0, begin, ((end - begin, 1, 1),) if end - begin > 1 else ())
            piece = Piece(slot, 0, move, "U8", "U8", 0, begin)
            reads.append(Read(file.name, begin, end, (piece,)))
    return reads


def _groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    group: list[Span] = []
    for span in spans:
        if group and span.end - group[0].begin > _SPAN_BYTES:
            yield group
            group = []
        if span.end > span.begin:
            group.append(span)
    if group:
        yield group


class _Checked(Target):
    """What copying and looking have in common: spans of files are compared with their digests."""

    def __init__(self, storage: Storage, files: Sequence[File]) -> None:
        self._storage, self._files = storage, files
        self._lock = threading.Lock()
        # By slot, where each group of spans begins.
        self._spans = [{group[0].begin: group for group in _groups(f.spans)} for f in files]

    def _wrong(self, read: Read, data: memoryview) -> Span | None:
        """Return the first span of a read whose digest differs."""
        for span in self._spans[read.pieces[0].slot][read.begin]:
            part = data[span.begin - read.begin : span.end - read.begin]
            if span.digest is not None and digest_of(part) != span.digest:
                return span
        return None


class LookTarget(_Checked):
    """Collects the files of a storage whose bytes are not those that are recorded.

    What has no digests is compared with `other`, where the same files lie.
    """

    def __init__(self, storage: Storage, files: Sequence[File], other: Storage) -> None:
        super().__init__(storage, files)
        self._other = other
        self.wrong: set[str] = set()

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        assert staged is not None
        file = self._files[read.pieces[0].slot]
        if file.name in self.wrong:
            return
        differs = self._wrong(read, staged.data) is not None
        if not differs and file.spans[0].digest is None:
            there = aligned(read.nbytes)
            self._other.read_into(file.name, read.begin, [there.data])
            differs = not np.array_equal(there, staged)
        if differs:
            with self._lock:
                self.wrong.add(file.name)

    def stop(self) -> None:
        pass


class CopyTarget(_Checked):
    """Writes files into a storage; `finished` hears of each that became visible."""

    def __init__(
        self,
        storage: Storage,
        files: Sequence[File],
        target: Writable,
        finished: Callable[[str], None],
    ) -> None:
        super().__init__(storage, files)
        self._target, self._finished = target, finished
        self._open: dict[int, Output] = {}
        self._missing = [file.nbytes for file in files]
        self._stopped = False

    def __enter__(self) -> CopyTarget:
        for file in self._files:
            if not file.nbytes:
                self._target.put(file.name, b"")
                self._finished(file.name)
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._open.values():
            output.discard()

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        assert staged is not None
        slot = read.pieces[0].slot
        file = self._files[slot]
        self._mended(read, staged)
        output = self._output(slot)
        output.write(read.begin, [staged.data])
        with self._lock:
            self._missing[slot] -= read.nbytes
            done = not self._missing[slot]
        if done:
            output.publish()
            with self._lock:
                del self._open[slot]
            self._finished(file.name)

    def _mended(self, read: Read, staged: np.ndarray) -> None:
        """Compare what was read with its digests; read again what differs, a few times."""
        for _ in range(_TRIES - 1):
            if (wrong := self._wrong(read, staged.data)) is None:
                return
            part = staged[wrong.begin - read.begin : wrong.end - read.begin]
            self._storage.read_into(str(read.file), wrong.begin, [part.data])
        if (wrong := self._wrong(read, staged.data)) is not None:
            part = staged[wrong.begin - read.begin : wrong.end - read.begin]
            raise DigestError(
                f"{self._storage.location}/{read.file}: bytes [{wrong.begin}, {wrong.end}) have "
                f"digest {digest_of(part.data)}, expected {wrong.digest}, after {_TRIES} tries; "
                f"the source is damaged: verify it, or copy from another place",
                file=read.file,
            )

    def _output(self, slot: int) -> Output:
        with self._lock:
            if slot not in self._open:
                file = self._files[slot]
                self._open[slot] = self._target.create(file.name, file.nbytes)
                if self._stopped:
                    self._open[slot].stop()
            return self._open[slot]

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            outputs = list(self._open.values())
        for output in outputs:
            output.stop()
