"""The raw limits of a disk: `preadv` by threads, through the page cache and past it.

What the engine is measured against, so it has threads of its own, and knows of no tensors: bytes of
files go into one block of memory.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from shardstate.buffers import PAGE_BYTES
from shardstate.storage.residency import probe_of


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[begin, end)` of a file, from its start."""

    path: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to read."""

    threads: int
    chunk_bytes: int
    direct: bool

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{how} {self.threads} × {self.chunk_bytes >> 20} MiB"


SWEEP = tuple(
    Setting(threads, chunk << 20, direct)
    for threads, chunk, direct in product((1, 2, 4, 8, 16), (1, 4, 16), (True, False))
)


def touched(nbytes: int) -> np.ndarray:
    """Return page-aligned memory that was written to: the first touch is slow, and no reading.

    Not in huge pages, since those who are compared fill parameters, which are not either.
    """
    memory = np.frombuffer(
        mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8
    )
    memory[::PAGE_BYTES] = 1
    return memory[:nbytes]


def room_for(spans: Sequence[Span]) -> int:
    """Return the bytes of memory that `read_spans` fills: whole pages of each file."""
    return sum(end - begin for begin, end in map(_pages, spans))


def read_spans(spans: Sequence[Span], setting: Setting, memory: np.ndarray) -> float:
    """Read the pages of `spans` into `memory`, one after the other; return the seconds.

    `OSError` where the file system refuses (EINVAL for O_DIRECT, say).
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if setting.direct else 0)
    opened: list[int] = []
    errors: list[OSError] = []
    try:
        opened.extend(os.open(span.path, flags) for span in spans)
        chunks = _chunks(spans, opened, setting.chunk_bytes)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    found = None if errors else next(chunks, None)
                if found is None:
                    return
                try:
                    _read(*found, memory=memory, direct=setting.direct)
                except OSError as error:
                    errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(setting.threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
    finally:
        for fd in opened:
            os.close(fd)
    if errors:
        raise errors[0]
    return seconds


def _pages(span: Span) -> tuple[int, int]:
    return span.begin // PAGE_BYTES * PAGE_BYTES, -(-span.end // PAGE_BYTES) * PAGE_BYTES


def _chunks(
    spans: Sequence[Span], opened: Sequence[int], chunk: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield descriptor, first byte, size, and place in memory of each request."""
    at = 0
    for span, fd in zip(spans, opened, strict=True):
        first, last = _pages(span)
        for begin in range(first, last, chunk):
            size = min(chunk, last - begin)
            yield fd, begin, size, at
            at += size


def _read(fd: int, begin: int, size: int, at: int, *, memory: np.ndarray, direct: bool) -> None:
    view = memory[at : at + size].data
    while view.nbytes:
        count = os.preadv(fd, [view], begin)
        if not count or (direct and count < view.nbytes):
            return  # the end of the file
        view, begin = view[count:], begin + count


def resident(spans: Sequence[Span]) -> float | None:
    """Return the share of `spans` that is in the page cache; None where nothing tells."""
    found = 0
    for span in spans:
        fd = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(fd, 1, 0)  # a probe must see this
            probe = probe_of(fd)
            if probe is None:
                return None
            found += min(probe(span.begin, span.end), span.end - span.begin)
        finally:
            os.close(fd)
    return found / max(1, sum(span.end - span.begin for span in spans))


def drop(spans: Sequence[Span]) -> None:
    """Ask the kernel to forget the files of `spans`; what is mapped stays."""
    for path in {span.path for span in spans}:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # what is dirty would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
