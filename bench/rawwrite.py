"""Raw limits of writing: `pwritev` of as many files as a set has, with fsync at the end."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from shardstate.raw import touched

CHUNK = 4 << 20
_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to write."""

    threads: int
    direct: bool
    allocated: bool  # the files get their blocks first (fallocate)

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{how} × {self.threads}{', pre-allocated' if self.allocated else ''}"


SWEEP = tuple(
    Setting(threads, direct, allocated)
    for threads, direct, allocated in product((1, 2, 4, 8), (False, True), (False, True))
)


def memory() -> np.ndarray:
    """Return what is written, again and again: no zeros, and more than the processor's caches keep.

    One block of 4 MiB would be written a fifth faster than anybody's tensors.
    """
    room = touched(_BLOCKS * CHUNK)
    room[:] = np.frombuffer(os.urandom(len(room)), dtype=np.uint8)
    return room


def write_files(folder: Path, sizes: Sequence[int], setting: Setting, block: np.ndarray) -> float:
    """Write files of `sizes` bytes, whole pages each, and fsync them; return the seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if setting.direct else 0)
    began = time.perf_counter()
    opened = []
    for i, size in enumerate(sizes):
        opened.append(os.open(folder / str(i), flags, 0o644))
        if setting.allocated:
            os.posix_fallocate(opened[-1], 0, size)
    chunks = iter(
        [
            (fd, at, min(CHUNK, size - at), (i * 7 + at // CHUNK) % _BLOCKS * CHUNK)
            for i, (fd, size) in enumerate(zip(opened, sizes, strict=True))
            for at in range(0, size, CHUNK)
        ]
    )
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                found = next(chunks, None)
            if found is None:
                return
            fd, at, count, first = found
            os.pwritev(fd, [block[first : first + count].data], at)

    workers = [threading.Thread(target=work) for _ in range(setting.threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in opened:
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds
