"""Reads past the page cache: O_DIRECT, with what it asks of offsets and addresses."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence

import numpy as np

from shardstate.buffers import Rooms
from shardstate.storage.libc import LIBC
from shardstate.storage.views import address_of, total

_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_PAGE = mmap.PAGESIZE


def alignment_of(fd: int) -> tuple[int, int] | None:
    """Return what O_DIRECT wants for a file: of addresses, of offsets and lengths, in bytes.

    None where the file cannot be read that way. Where nothing tells (Linux before 6.1), a page.
    """
    status = ctypes.create_string_buffer(256)
    try:
        call = LIBC.statx
    except AttributeError:
        return _PAGE, _PAGE
    if call(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, status):
        return _PAGE, _PAGE
    (mask,) = struct.unpack_from("=I", status, 0)
    if not mask & _STATX_DIOALIGN:
        return _PAGE, _PAGE
    memory, offset = struct.unpack_from("=II", status, 0x98)
    return (memory, offset) if memory and offset else None


class DirectFile:
    """One file, opened past the page cache."""

    def __init__(self, fd: int, memory: int, offset: int) -> None:
        self.fd = fd
        self._memory, self._offset = memory, offset

    def read_into(self, begin: int, views: Sequence[memoryview], rooms: Rooms) -> int:
        """Fill `views` with the bytes from `begin` on, by way of `rooms` where they lie askew.

        Returns how many there were.
        Fewer than asked for only at the end of the file. `OSError` (EINVAL) where the file system
        wants another alignment than it says.
        """
        nbytes = total(views)
        first = begin // self._offset * self._offset
        last = -(-(begin + nbytes) // self._offset) * self._offset
        if len(views) == 1 and last - first > 2 * self._offset:
            at = address_of(views[0]) - begin + first + self._offset
            if at % self._memory == 0:
                return self._in_place(begin, views[0], first, last, rooms)
        goals = [np.frombuffer(view, dtype=np.uint8) for view in views if view.nbytes]
        done, end = 0, begin + nbytes
        with rooms.lent() as room:
            while first < last:
                asked = min(len(room), last - first)
                count = self._fill(first, [room[:asked].data])
                found = room[begin + done - first : min(count, end - first)]
                done += _scatter(found, goals)
                if count < asked:
                    break  # the end of the file
                first += count
        return done

    def _in_place(self, begin: int, view: memoryview, first: int, last: int, rooms: Rooms) -> int:
        """Read all but the ends straight into `view`: these are less than what is read at once."""
        unit, end = self._offset, begin + view.nbytes
        head, tail = (first + unit) - begin, end - (last - unit)
        middle = view[head : view.nbytes - tail]
        with rooms.lent() as ends:
            count = self._fill(first, [ends[:unit].data, middle, ends[unit : 2 * unit].data])
            view[:head] = ends[unit - head : unit].data
            view[view.nbytes - tail :] = ends[unit : unit + tail].data
        return max(0, min(count - (begin - first), view.nbytes))

    def _fill(self, begin: int, views: Sequence[memoryview]) -> int:
        """Read until `views` are full or the file ends; return the bytes read."""
        done, pending = 0, list(views)
        while pending:
            count = os.preadv(self.fd, pending, begin + done)
            done += count
            if count % self._offset or not count:
                break  # the end of the file
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if pending and count:
                pending[0] = pending[0][count:]
        return done


def _scatter(found: np.ndarray, goals: list[np.ndarray]) -> int:
    """Move bytes to where they belong, take what is full off `goals`, and return their number."""
    at = 0
    while at < len(found):
        goal = goals[0]
        part = found[at : at + len(goal)]
        goal[: len(part)] = part
        at += len(part)
        if len(part) == len(goal):
            goals.pop(0)
        else:
            goals[0] = goal[len(part) :]
    return at
