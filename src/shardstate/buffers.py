"""Memory that the kernel fills quickly."""

from __future__ import annotations

import mmap

import numpy as np

PAGE_BYTES = mmap.PAGESIZE

# Where the first byte of a destination lies. The kernel copies out of the page cache at a third of
# its speed to memory that begins in the middle of a cache line, unless the source does so as well;
# numpy's own arrays begin 16 bytes behind a line.
LINE_BYTES = 64


def aligned(nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of memory that begin a cache line, as uint8, with nothing in them."""
    memory = np.empty(nbytes + LINE_BYTES, dtype=np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return memory[first : first + nbytes]


def staging_buffer(nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of page-aligned memory of their own, as uint8."""
    return np.frombuffer(
        mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8
    )[:nbytes]
