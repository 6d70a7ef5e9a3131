"""Rows of a file out of the page cache, without what lies between them.

`preadv` copies all bytes from the first to the last. A mapping of the file does not have to, but
who touches one dies (SIGBUS) where the file was truncated meanwhile. So the kernel touches it:
`process_vm_writev`, of this process to itself, takes a list of rows, and what is gone is an error.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence

import numpy as np

from shardstate.storage.base import Runs
from shardstate.storage.libc import LIBC
from shardstate.storage.output import IOV_MAX

_FAILED = ctypes.c_void_p(-1).value

_write: ctypes._NamedFuncPointer | None = getattr(LIBC, "process_vm_writev", None)
if _write is not None:
    _write.restype = ctypes.c_ssize_t
    _write.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)
# Not the module of that name: it takes a descriptor for each mapping.
_mmap, _munmap = LIBC.mmap, LIBC.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class MappedFile:
    """One file, of which the kernel gathers; nobody else may touch the mapping.

    Its descriptor stays open, by whoever gave it, until it is closed.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._nbytes = fd, os.fstat(fd).st_size
        self._address = _mmap(None, self._nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if self._address == _FAILED:
            raise _error(ctypes.get_errno())

    def gather(self, runs: Sequence[Runs]) -> None:
        """Copy each of `runs` to its place; `OSError` if one is not there, or may not be."""
        if _write is None:
            raise _error(errno.ENOSYS)
        for each in runs:
            if each.end > self._nbytes:
                raise _error(errno.EFAULT)
            # As the kernel wants them: pairs of address and size.
            sources = np.full((len(each.begins), 2), each.nbytes, dtype=np.uintp)
            np.add(each.begins, self._address, out=sources[:, 0], casting="unsafe")
            goals = sources.copy()
            goals[:, 0] = each.addresses
            for at in range(0, len(sources), IOV_MAX):
                source, goal = sources[at : at + IOV_MAX], goals[at : at + IOV_MAX]
                asked = len(source) * each.nbytes
                if each.together:
                    goal = goal[:1]
                    goal[0, 1] = asked
                found = _write(
                    os.getpid(), source.ctypes.data, len(source), goal.ctypes.data, len(goal), 0
                )
                if found != asked:
                    raise _error(ctypes.get_errno() if found < 0 else errno.EFAULT)
        # Up to the end of its last page a file that was truncated reads as zeros.
        if os.fstat(self._fd).st_size < max(each.end for each in runs):
            raise _error(errno.EFAULT)

    def close(self) -> None:
        _munmap(self._address, self._nbytes)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
