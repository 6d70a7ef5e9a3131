"""Memory that the kernel fills quickly."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np

PAGE_BYTES = mmap.PAGESIZE

# Where the first byte of a destination lies. The kernel copies out of the page cache at a third of
# its speed to memory that begins in the middle of a cache line, unless the source does so as well;
# numpy's own arrays begin 16 bytes behind a line.
LINE_BYTES = 64

# A device is told of each stretch of physical memory apart. Pages of 4 KiB that were touched by
# several threads lie scattered, and disks that are asked for 256 stretches deliver two thirds of
# what they do for one.
HUGE_BYTES = 2 << 20


def aligned(nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of memory, as uint8, with nothing in them.

    They begin a cache line; where they are many, a page, as tensors do in rank files: then they can
    be read past the page cache in place.
    """
    unit = PAGE_BYTES if nbytes >= 16 * PAGE_BYTES else LINE_BYTES
    memory = np.empty(nbytes + unit, dtype=np.uint8)
    first = -memory.ctypes.data % unit
    return memory[first : first + nbytes]


def staging_buffer(nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of page-aligned memory of their own, as uint8.

    Whole multiples of `HUGE_BYTES` of it lie in huge pages where the kernel has them.
    """
    huge = nbytes // HUGE_BYTES * HUGE_BYTES
    room = mmap.mmap(
        -1, max(1, nbytes + bool(huge) * HUGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    memory = np.frombuffer(room, dtype=np.uint8)
    first = -memory.ctypes.data % HUGE_BYTES if huge else 0
    if huge:
        with contextlib.suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE, first, huge)
    return memory[first : first + nbytes]


class Rooms:
    """Staging memory of `nbytes` each, used again and again."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: list[np.ndarray] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[np.ndarray]:
        try:
            room = self._free.pop()
        except IndexError:
            memory = staging_buffer(max(self.nbytes, HUGE_BYTES))  # small ones share a huge page
            whole = len(memory) // self.nbytes * self.nbytes
            room, *others = memory[:whole].reshape(-1, self.nbytes)
            self._free += others
        try:
            yield room
        finally:
            self._free.append(room)
