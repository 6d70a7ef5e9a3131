"""A local directory.

Reads are `preadv`, never mmap, but for rows that the page cache holds (`gather`): on network file
systems its page-sized faults are a hundred times slower. Writes go to temporary names with
`O_EXCL | O_NOFOLLOW` and are renamed, so that a file appears whole or not at all and nothing is
ever written through a link.
"""

from __future__ import annotations

import contextlib
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

from shardstate.errors import InputError, TargetBusy, TruncatedFile
from shardstate.storage.adaptive import AdaptiveReader
from shardstate.storage.base import Entry, Reading, Traits
from shardstate.storage.oserrors import mapped_errors
from shardstate.storage.output import IOV_MAX, LocalOutput
from shardstate.storage.views import rest_of, total

_log = logging.getLogger("shardstate")


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
                count = os.preadv(fd, pending[:IOV_MAX], at)
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
                count = os.preadv(fd, pending[:IOV_MAX], begin + done, os.RWF_NOWAIT)
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
            with contextlib.suppress(FileNotFoundError), self.folder(name) as (folder, last):
                os.unlink(last, dir_fd=folder)
            for above in list(PurePosixPath(name).parents)[:-1]:
                # Folders of companions go with the last of them; others are not empty.
                with contextlib.suppress(OSError), self.folder(str(above)) as (folder, last):
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
    def folder(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
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
