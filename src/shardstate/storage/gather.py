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

_write: ctypes._NamedFuncPointer | None = getattr(LIBC, "process_vm_writev", None)
if _write is not None:
    _write.restype = ctypes.c_ssize_t
    _write.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)


class MappedFile:
    """One file, of which the kernel gathers; nobody else may touch the mapping."""

    def __init__(self, fd: int) -> None:
        self._mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._nbytes = len(self._mapping)
        self._address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data

    def gather(self, runs: Sequence[Runs]) -> None:
        """Copy each of `runs` to its place; `OSError` if one is not there, or may not be."""
        if _write is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        for each in runs:
            if each.end > self._nbytes:
                raise OSError(errno.EFAULT, "the file is shorter")
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
                    code = ctypes.get_errno() if found < 0 else errno.EFAULT
                    raise OSError(code, os.strerror(code))

    def close(self) -> None:
        self._mapping.close()
