"""A local directory.

Reads are buffered `preadv`, never mmap: on network file systems its page-sized faults are a
hundred times slower. Writes go to temporary names with `O_EXCL | O_NOFOLLOW` and are renamed, so
that a file appears whole or not at all and nothing is ever written through a link.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from shardstate.errors import InputError, PathNotFound, StorageError, TargetBusy, TruncatedFile
from shardstate.names import temporary_name
from shardstate.storage.adaptive import AdaptiveReader
from shardstate.storage.base import Entry, Reading, Traits
from shardstate.storage.views import rest_of, total

_log = logging.getLogger("shardstate")

_IOV_MAX = 1024
_WRITEBACK_BYTES = 32 << 20  # start writing to the disk each time that much has been written
_SYNC_FILE_RANGE_WRITE = 2

_ADVICE = {
    errno.EACCES: "check the permissions of the path and who runs this",
    errno.EPERM: "check the permissions of the path and who runs this",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "the disk is full: free some space or choose another place, then run it again",
    errno.EDQUOT: "the quota is used up: free some space, then run it again",
    errno.EFBIG: "a limit on file sizes was reached (ulimit -f): raise it or use smaller parts",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the device failed: check its health (dmesg), then try again",
    errno.ELOOP: "a link is in the way, and nothing is written through links: remove it",
}


@contextlib.contextmanager
def mapped_errors(operation: str, path: str, *, name: str | None = None) -> Iterator[None]:
    """Turn an OSError of the operating system into one of ours, that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (StorageError, InputError)):
            raise
        cause = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise PathNotFound(
                f"{path}: cannot {operation}: {cause}; check the path", file=name
            ) from error
        advice = _ADVICE.get(error.errno or 0, "check the file system, then try again")
        raise StorageError(f"{path}: cannot {operation}: {cause}; {advice}", file=name) from error


class LocalStorage:
    """Files of one directory; `create=True` makes it, and its parents, where it is missing."""

    # Two threads reach what a disk gives through the page cache. Writing hashes too, and waits for
    # the disk while a file is fsynced: measured best among 2, 3, 4 and 8 on two cores.
    traits = Traits(read_threads=2, write_threads=3, max_gap_bytes=256 << 10, remote=False)

    def __init__(
        self, path: str | os.PathLike[str], *, create: bool = False, reading: Reading | None = None
    ) -> None:
        self.location = os.path.abspath(os.fspath(path))
        self.reading = reading or Reading()
        if (chunk_bytes := self.reading.chunk_bytes) is not None:
            self.traits = replace(self.traits, chunk_bytes=chunk_bytes)
        self._lock = threading.Lock()
        self.opening = threading.Lock()  # of what a reader opens
        self._open: dict[str, int] = {}
        with mapped_errors("open the directory", self.location):
            if create:
                os.makedirs(self.location, exist_ok=True)
            self._root = os.open(self.location, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def entries(self) -> dict[str, Entry]:
        found = {}
        with mapped_errors("list", self.location), os.scandir(self._root) as listing:
            for item in listing:
                if (entry := _entry(item, item.name)) is not None:
                    found[item.name] = entry
        return dict(sorted(found.items()))

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        return (entry for _, entry in self._walk(self._root, "", wanted) if entry is not None)

    def strays(self) -> list[str]:
        found = self._walk(self._root, "", lambda _name: True)
        return [name for name, entry in found if entry is None]

    def _walk(
        self, folder: int, prefix: str, wanted: Callable[[str], bool]
    ) -> Iterator[tuple[str, Entry | None]]:
        with mapped_errors("list", self._path(prefix)), os.scandir(folder) as listing:
            items = sorted(listing, key=lambda item: item.name)
        for item in items:
            name = prefix + item.name
            if item.is_dir(follow_symlinks=False):
                if not wanted(name):
                    continue
                try:
                    below = os.open(
                        item.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder
                    )
                except OSError as error:
                    _log.warning(
                        "shardstate: %s: passed over: %s", self._path(name), error.strerror
                    )
                    continue
                try:
                    yield from self._walk(below, name + "/", wanted)
                finally:
                    os.close(below)
            else:
                with mapped_errors("look at", self._path(name), name=name):
                    entry = _entry(item, name)
                yield name, entry

    def size(self, name: str) -> int:
        return os.fstat(self._fd(name)).st_size

    def read(self, name: str, *, limit: int) -> bytes:
        nbytes = self.size(name)
        if nbytes > limit:
            raise InputError(
                f"{self._path(name)}: has {nbytes} bytes, more than the {limit} that a file of "
                f"this kind may have",
                file=name,
            )
        data = bytearray(nbytes)
        self.read_into(name, 0, [memoryview(data)])
        return bytes(data)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        fd, at = self._fd(name), begin
        pending = [view for view in views if view.nbytes]
        while pending:
            with mapped_errors("read", self._path(name), name=name):
                count = os.preadv(fd, pending[:_IOV_MAX], at)
            if not count:
                raise self.truncated(name, at, total(pending))
            at += count
            pending = rest_of(pending, count)

    def read_resident(self, name: str, begin: int, views: Sequence[memoryview]) -> int:
        """Fill `views` as far as the page cache holds the file from `begin` on; return how far."""
        fd, done = self._fd(name), 0
        pending = [view for view in views if view.nbytes]
        while pending:
            try:
                count = os.preadv(fd, pending[:_IOV_MAX], begin + done, os.RWF_NOWAIT)
            except OSError:  # it would wait, or this file system cannot tell
                count = 0
            if not count:
                break
            done += count
            pending = rest_of(pending, count)
        return done

    def truncated(self, name: str, end: int, lacking: int) -> TruncatedFile:
        """Return the error for a file that ends at byte `end`, before all was read."""
        return TruncatedFile(
            f"{self._path(name)}: ends at byte {end}, {lacking} more were planned; "
            f"it was truncated: fetch it again",
            file=name,
        )

    def mapped(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Turn an OSError of reading `name` into one of ours."""
        return mapped_errors("read", self._path(name), name=name)

    def descriptor(self, name: str) -> int:
        """Return the descriptor of a regular file; it is closed with the storage."""
        return self._fd(name)

    def reader(self, threads: int) -> AdaptiveReader:
        return AdaptiveReader(self, threads)

    def map(self, name: str) -> np.ndarray:
        fd = self._fd(name)
        if not os.fstat(fd).st_size:
            return np.empty(0, dtype=np.uint8)
        with mapped_errors("map", self._path(name), name=name):
            return np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), dtype=np.uint8)

    def expect(self, files: Mapping[str, int]) -> None:
        pass

    def interrupt(self, on: bool = True) -> None:
        pass  # no call waits for long

    def close(self) -> None:
        with self._lock:
            fds, self._open = [*self._open.values()], {}
            if self._root >= 0:
                fds.append(self._root)
                self._root = -1
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> LocalStorage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, name: str, nbytes: int) -> LocalOutput:
        self._forget(name)
        return LocalOutput(self, name, nbytes)

    def put(self, name: str, data: bytes | memoryview) -> None:
        output = self.create(name, len(data))
        try:
            output.write(0, [memoryview(data)])
            output.publish()
        finally:
            output.discard()

    def remove(self, name: str) -> None:
        self._forget(name)
        with mapped_errors("remove", self._path(name), name=name):
            with contextlib.suppress(FileNotFoundError), self._folder(name) as (folder, last):
                os.unlink(last, dir_fd=folder)
            for above in list(PurePosixPath(name).parents)[:-1]:
                # Folders of companions go with the last of them; others are not empty.
                with contextlib.suppress(OSError), self._folder(str(above)) as (folder, last):
                    os.rmdir(last, dir_fd=folder)

    def sync(self) -> None:
        with mapped_errors("sync", self.location):
            os.fsync(self._root)

    def free_bytes(self) -> int | None:
        with mapped_errors("ask for the free space of", self.location):
            space = os.fstatvfs(self._root)
        return space.f_bavail * space.f_frsize

    @contextlib.contextmanager
    def lock(self, name: str | None = None) -> Iterator[None]:
        with self._flock(".", fcntl.LOCK_EX if name is None else fcntl.LOCK_SH):
            if name is None:
                yield
                return
            with self._flock(name, fcntl.LOCK_EX):
                try:
                    yield
                finally:
                    self.remove(name)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep others from locking all of the directory, while it is read."""
        with self._flock(".", fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def _flock(self, name: str, operation: int) -> Iterator[None]:
        """Hold a lock on the root (".") or on a file of its own, made for that."""
        path = self.location if name == "." else self._path(name)
        fd = -1
        with mapped_errors("lock", path):
            if name == ".":
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, 0o666, dir_fd=self._root)
        try:
            with mapped_errors("lock", path):
                try:
                    fcntl.flock(fd, operation | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TargetBusy(
                        f"{path}: another process is writing there; wait until it is done"
                    ) from None
                held = os.fstat(fd).st_ino
                try:
                    # The path may have been replaced since it was opened.
                    there = os.stat(path, follow_symlinks=name == ".").st_ino
                except FileNotFoundError:
                    there = -1
                root = os.fstat(self._root).st_ino
            if held != there or (name == "." and held != root):
                raise TargetBusy(f"{path}: was replaced while it was being locked; try again")
            yield
        finally:
            os.close(fd)

    def _path(self, name: str) -> str:
        return os.path.join(self.location, name)

    def _fd(self, name: str) -> int:
        """Return the descriptor of a regular file, opened once for all threads."""
        with self._lock:
            if (known := self._open.get(name)) is not None:
                return known
            with mapped_errors("open", self._path(name), name=name):
                # O_NONBLOCK: opening a pipe must not wait for its other end.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
                fd = os.open(name, flags, dir_fd=self._root)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise InputError(f"{self._path(name)}: is no regular file", file=name)
            self._open[name] = fd
            return fd

    def _forget(self, name: str) -> None:
        with self._lock:
            fd = self._open.pop(name, None)
        if fd is not None:
            os.close(fd)

    @contextlib.contextmanager
    def _folder(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder that `name` is in, through real folders only; yields (fd, last part)."""
        *folders, last = PurePosixPath(name).parts
        fd = os.dup(self._root)
        try:
            for folder in folders:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=fd)
                        os.fsync(fd)
                below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, last
        finally:
            os.close(fd)


class LocalOutput:
    """A file of a `LocalStorage` under a temporary name until it is published."""

    def __init__(self, storage: LocalStorage, name: str, nbytes: int) -> None:
        self._storage, self._name, self._nbytes = storage, name, nbytes
        self._path = storage._path(name)
        self._written = 0
        self._fd = -1
        with self._mapped("create"), storage._folder(name, create=True) as (folder, last):
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
                count = os.pwritev(self._fd, pending[:_IOV_MAX], at)
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
        with self._mapped("rename"), storage._folder(self._name) as (folder, last):
            os.rename(temporary_name(last), last, src_dir_fd=folder, dst_dir_fd=folder)
            fd, self._fd = self._fd, -1
            os.close(fd)
            os.fsync(folder)

    def discard(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        with self._mapped("remove"), self._storage._folder(self._name) as (folder, last):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary_name(last), dir_fd=folder)

    def _mapped(self, operation: str) -> contextlib.AbstractContextManager[None]:
        return mapped_errors(operation, self._path, name=self._name)


def _entry(item: os.DirEntry[str], name: str) -> Entry | None:
    """Return the entry of a regular file, or of what a link leads to; None for anything else."""
    try:
        status = item.stat(follow_symlinks=True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None  # a link that leads nowhere, or removed since it was listed
        raise
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(name, status.st_size, (status.st_size, status.st_mtime_ns, status.st_ino))


def _of_libc(name: str, *arguments: type) -> ctypes._NamedFuncPointer | None:
    """Return a function of the C library, or None where it has no such one."""
    try:
        function: ctypes._NamedFuncPointer = getattr(ctypes.CDLL(None, use_errno=True), name)
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
