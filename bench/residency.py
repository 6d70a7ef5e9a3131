"""Puts files into the page cache, or out of it, and proves it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardstate.storage.libc import LIBC


def resident(files: Sequence[Path]) -> float:
    """Return the share of the files' pages that is in the page cache (mincore)."""
    pages = found = 0
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            view = mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                             flags=mmap.MAP_PRIVATE)  # fmt: skip
        count = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * count)()
        start = ctypes.c_char.from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(start))
        if LIBC.mincore(address, ctypes.c_size_t(size), vector):
            raise OSError(ctypes.get_errno(), "mincore")
        del start
        view.close()
        pages += count
        found += int(np.count_nonzero(np.frombuffer(vector, dtype=np.uint8) & 1))
    return found / max(1, pages)


def warm(files: Sequence[Path]) -> None:
    """Read the files, twice if need be; raise unless they are in the page cache then."""
    for _ in range(2):
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass
        if resident(files) == 1:
            return
    if (share := resident(files)) < 0.999:
        raise RuntimeError(f"only {share:.1%} of the files stayed in the page cache")


def cold(files: Sequence[Path]) -> None:
    """Drop the files from the page cache; raise unless they are gone then."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (share := resident(files)) > 0.001:
        raise RuntimeError(f"{share:.1%} of the files stayed in the page cache")


def half(files: Sequence[Path], stripe: int = 32 << 20) -> None:
    """Leave every other stripe of the files in the page cache; raise unless half of it is there."""
    cold(files)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # do not read ahead
            for begin in range(0, file.stat().st_size, 2 * stripe):
                opened.seek(begin)
                left = stripe
                while left and (data := opened.read(min(left, 1 << 20))):
                    left -= len(data)
    if not 0.45 < (share := resident(files)) < 0.55:
        raise RuntimeError(f"{share:.1%} of the files are in the page cache")
