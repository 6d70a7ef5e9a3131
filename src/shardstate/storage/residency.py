"""How much of a range of a file is in the page cache.

`cachestat` tells where there is one (Linux 6.5) and where it sees the pages: on overlay file
systems they belong to another inode, and it says none. `mincore` sees them there. It is not asked
first, because it needs a mapping, and because it calls everything resident where it may not tell.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np

from shardstate.storage.libc import LIBC

_PAGE = mmap.PAGESIZE
_CACHESTAT = 451  # the number of the system call, on all architectures

Probe = Callable[[int, int], int]  # bytes [begin, end) of a file → how many of them are resident


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


class Resident:
    """What of one file was in the page cache before it was read here.

    Looked at by MiB, and so many at once that it is further than anything is read ahead.
    """

    _CELL, _CELLS = 1 << 20, 64

    def __init__(self, probe: Probe | None, nbytes: int) -> None:
        self._probe, self._nbytes = probe, nbytes
        self._seen: dict[int, bool] = {}  # cell → whether all of it was resident

    def __call__(self, begin: int, end: int) -> bool:
        """Return whether all that lies around bytes `[begin, end)`, one or more, was resident."""
        cells = range(begin // self._CELL, (end - 1) // self._CELL + 1)
        if any(cell not in self._seen for cell in cells):
            first = cells[0] // self._CELLS * self._CELLS
            last = cells[-1] // self._CELLS * self._CELLS + self._CELLS
            whole = self._ask(first, last)  # most are there or not as one
            for cell in range(first, last):
                if cell not in self._seen:
                    self._seen[cell] = whole or self._ask(cell, cell + 1)
        return all(self._seen[cell] for cell in cells)

    def _ask(self, cell: int, last: int) -> bool:
        """Return whether all of the cells from `cell` up to `last` are resident."""
        begin, end = cell * self._CELL, min(last * self._CELL, self._nbytes)
        if self._probe is None or begin >= end:
            return False
        try:
            return self._probe(begin, end) >= end - begin
        except OSError:
            self._probe = None
            return False


def probe_of(fd: int) -> Probe | None:
    """Return what tells how much of an open file is resident; None where nothing does.

    The first bytes of the file must have been read through the page cache: what does not see them
    there sees nothing.
    """
    for make in (_by_cachestat, _by_mincore):
        try:
            probe = make(fd)
            if probe(0, 1):
                return probe
        except (OSError, AttributeError, ValueError):
            continue  # no such call here, or a sandbox that refuses it
    return None


def _by_cachestat(fd: int) -> Probe:
    call = LIBC.syscall

    def probe(begin: int, end: int) -> int:
        pages = _Pages()
        asked = _Range(begin, end - begin)
        if call(_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(pages), 0):
            raise OSError(ctypes.get_errno(), "cachestat")
        return _bytes_of(pages.cached, begin, end)

    return probe


def _by_mincore(fd: int) -> Probe:
    call = LIBC.mincore
    # Never touched, so that a file that shrinks cannot harm.
    mapped = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), dtype=np.uint8)
    address = mapped.ctypes.data

    def probe(begin: int, end: int) -> int:
        first = begin // _PAGE * _PAGE
        flags = np.empty(-(-(end - first) // _PAGE), dtype=np.uint8)
        length = min(end, len(mapped)) - first
        if call(
            ctypes.c_void_p(address + first),
            ctypes.c_size_t(length),
            ctypes.c_void_p(flags.ctypes.data),
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        return _bytes_of(int(np.count_nonzero(flags & 1)), begin, end)

    return probe


def _bytes_of(pages: int, begin: int, end: int) -> int:
    """Return the bytes of a range that so many of its pages hold; all where all pages are there."""
    count = (end - 1) // _PAGE - begin // _PAGE + 1
    return end - begin if pages >= count else pages * _PAGE
