"""Files of a local directory while they are written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardstate.names import temporary_name
from shardstate.storage.libc import LIBC
from shardstate.storage.oserrors import mapped_errors
from shardstate.storage.views import rest_of

if TYPE_CHECKING:
    from shardstate.storage.local import LocalStorage

IOV_MAX = 1024
_WRITEBACK_BYTES = 32 << 20  # start writing to the disk each time that much has been written
_SYNC_FILE_RANGE_WRITE = 2


class LocalOutput:
    """A file of a `LocalStorage` under a temporary name until it is published."""

    def __init__(self, storage: LocalStorage, name: str, nbytes: int) -> None:
        self._storage, self._name, self._nbytes = storage, name, nbytes
        self._path = os.path.join(storage.location, name)
        self._written = 0
        self._fd = -1
        with self._mapped("create"), storage.folder(name, create=True) as (folder, last):
            temporary = temporary_name(last)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(temporary, flags, 0o666, dir_fd=folder)
            try:
                _allocate(self._fd, nbytes)
            except OSError:
                self.discard()
                raise

    def write(self, begin: int, views: Sequence[memoryview]) -> None:
        at, pending = begin, [view for view in views if view.nbytes]
        while pending:
            with self._mapped("write"):
                count = os.pwritev(self._fd, pending[:IOV_MAX], at)
            at += count
            pending = rest_of(pending, count)
        before, self._written = self._written, self._written + at - begin
        if before // _WRITEBACK_BYTES != self._written // _WRITEBACK_BYTES:
            _start_writeback(self._fd)

    def stop(self) -> None:
        pass  # nobody waits

    def publish(self) -> None:
        storage = self._storage
        with self._mapped("write"):
            os.fsync(self._fd)
        with self._mapped("rename"), storage.folder(self._name) as (folder, last):
            os.rename(temporary_name(last), last, src_dir_fd=folder, dst_dir_fd=folder)
            fd, self._fd = self._fd, -1
            os.close(fd)
            os.fsync(folder)

    def discard(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        with self._mapped("remove"), self._storage.folder(self._name) as (folder, last):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary_name(last), dir_fd=folder)

    def _mapped(self, operation: str) -> contextlib.AbstractContextManager[None]:
        return mapped_errors(operation, self._path, name=self._name)


def _of_libc(name: str, *arguments: type) -> ctypes._NamedFuncPointer | None:
    """Return a function of the C library, or None where it has no such one."""
    try:
        function: ctypes._NamedFuncPointer = getattr(LIBC, name)
    except (OSError, AttributeError):
        return None
    function.argtypes = arguments
    return function


_sync_file_range = _of_libc(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_fallocate = _of_libc("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _allocate(fd: int, nbytes: int) -> None:
    """Give a new file its size, and its blocks where the file system can: then a full disk is
    known before anything is written, and the blocks lie together.
    """
    while _fallocate is not None and nbytes and _fallocate(fd, 0, 0, nbytes):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            break  # not os.posix_fallocate: the C library would write all blocks instead
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    os.truncate(fd, nbytes)


def _start_writeback(fd: int) -> None:
    """Let the disk begin with what was written so far, without waiting for it."""
    if _sync_file_range is not None:
        _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)
