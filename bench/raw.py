"""Raw limits of a disk: `preadv` of whole files by threads, with and without the page cache.

Nothing here knows of tensors: the bytes of the files go into one block of memory that was touched
before, so that what is measured is reading alone.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

_ALIGN = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to read."""

    threads: int
    chunk: int  # bytes
    direct: bool

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{how} {self.threads}×{self.chunk >> 20} MiB"


SWEEP = tuple(
    Setting(threads, chunk << 20, direct)
    for threads, chunk, direct in product((1, 2, 4, 8, 16), (1, 4, 16), (True, False))
)


def touched(nbytes: int) -> np.ndarray:
    """Return page-aligned memory that was written to before."""
    memory = np.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=np.uint8)
    memory[::_ALIGN] = 1
    return memory


def room_for(files: Sequence[Path]) -> int:
    """Return the bytes that `read_files` needs."""
    return sum(-(-file.stat().st_size // _ALIGN) * _ALIGN for file in files)


def read_files(files: Sequence[Path], setting: Setting, memory: np.ndarray) -> float:
    """Read all bytes of `files` into `memory`, each at a multiple of 4096; return the seconds."""
    flags = os.O_RDONLY | (os.O_DIRECT if setting.direct else 0)
    opened = [os.open(file, flags) for file in files]
    chunks = _chunks(files, opened, setting.chunk)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                found = next(chunks, None)
            if found is None:
                return
            fd, begin, want, at = found
            view = memory[at : at + want].data
            while view.nbytes:
                count = os.preadv(fd, [view], begin)
                if count < view.nbytes and (not count or setting.direct):
                    break  # the end of the file, which is no multiple
                view, begin = view[count:], begin + count

    workers = [threading.Thread(target=work) for _ in range(setting.threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    for fd in opened:
        os.close(fd)
    return seconds


def _chunks(
    files: Sequence[Path], opened: Sequence[int], chunk: int
) -> Iterator[tuple[int, int, int, int]]:
    at = 0
    for file, fd in zip(files, opened, strict=True):
        size = -(-file.stat().st_size // _ALIGN) * _ALIGN
        for begin in range(0, size, chunk):
            want = min(chunk, size - begin)
            yield fd, begin, want, at
            at += want
