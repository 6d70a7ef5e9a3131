"""What the rest of the library asks of a storage; each implementation passes one contract suite.

Names are relative to the storage's root, with `/` between folders. Failures of the storage itself
come out as `StorageError`, what it holds as `InputError`; no foreign exception gets through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file: its size, and what changes when its content does."""

    name: str
    nbytes: int
    identity: tuple[int | str, ...]  # local: size, mtime in ns, inode


@dataclass(frozen=True, slots=True)
class Traits:
    """What a storage is good at. Measured: see `docs/benchmarks.md`."""

    read_threads: int  # that it serves best at once
    write_threads: int
    max_gap_bytes: int  # reading over this costs less than another request
    remote: bool  # whether a cache in front of it makes sense
    chunk_bytes: int | None = None  # the most that one request may ask for; None: no opinion


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a caller decides of how to read; None leaves it to the storage."""

    threads: int | None = None  # reads in flight
    direct: bool | None = None  # past the page cache, or through it
    chunk_bytes: int | None = None  # the most that one request asks for


Arrived = Callable[[int], None]  # bytes that are there now, from the first one on


class Runs(NamedTuple):
    """Stretches of a file, all of one size, and the memory that each goes to."""

    begins: np.ndarray  # int64, bytes from the start of the file
    end: int  # one past the last byte of all of them
    addresses: np.ndarray  # int64
    nbytes: int  # of each
    together: bool  # whether their memory is one run, too


class Reader(Protocol):
    """Reads for one execution; it may choose the way while it runs, from what it sees."""

    threads: int  # the most reads that it ever wants in flight

    @property
    def limit(self) -> int:
        """How many reads are to be in flight now."""
        ...

    def read_into(
        self,
        name: str,
        begin: int,
        views: Sequence[memoryview],
        arrived: Arrived | None = None,
    ) -> int:
        """Do what the storage's `read_into` does; return how many bytes a cache here held.

        `arrived` may be told, now and then, how much of it is there.
        """
        ...

    def gather(self, name: str, begin: int, end: int, runs: Sequence[Runs]) -> bool:
        """Carry out `runs`, all within bytes `[begin, end)`, if a cache here holds these.

        False: it does not, and nothing was done that another read does not undo.
        """
        return False

    def stop(self) -> None:
        """Let reads that wait or have more to come give up, since another thread failed."""
        ...

    def close(self) -> None:
        """Release what was opened for this execution."""
        ...


class PlainReader(Reader):
    """Reads as the storage does, always with the same number of reads in flight."""

    def __init__(self, storage: Storage, threads: int) -> None:
        self._storage, self.threads = storage, threads

    @property
    def limit(self) -> int:
        return self.threads

    def read_into(
        self,
        name: str,
        begin: int,
        views: Sequence[memoryview],
        arrived: Arrived | None = None,
    ) -> int:
        self._storage.read_into(name, begin, views)
        return 0

    def stop(self) -> None:
        self._storage.interrupt()

    def close(self) -> None:
        pass


class Storage(Protocol):
    """Read side. All methods may be called from several threads."""

    location: str  # for messages and manifests: absolute, without credentials

    @property
    def traits(self) -> Traits:
        """What it is good at, as far as is known by now."""
        ...

    def entries(self) -> dict[str, Entry]:
        """Return the regular files directly below the root; a link to one counts as one."""
        ...

    def walk(self, wanted: Callable[[str], bool] = ...) -> Iterator[Entry]:
        """Yield the regular files of the root and of its `wanted` folders, by name.

        A folder that may not be read (`lost+found`, say) is passed over with a warning.
        """
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def read(self, name: str, *, limit: int) -> bytes:
        """Return a whole small file; `InputError` if it has more than `limit` bytes."""
        ...

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        """Fill `views`, one after the other, with the file's bytes from `begin` on.

        All of them or `TruncatedFile`.
        """
        ...

    def reader(self, threads: int) -> Reader:
        """Return what reads for one execution.

        `threads` is how many reads are best in flight where nothing has to be waited for.
        """
        ...

    def map(self, name: str) -> np.ndarray:
        """Return a file as writable bytes that never reach it; `UsageError` where none can be."""
        ...

    def expect(self, files: Mapping[str, int]) -> None:
        """Prepare for reading about so many bytes of each file."""
        ...

    def interrupt(self, on: bool = True) -> None:
        """Let calls that wait give up, since another thread failed; with `on` False no more."""
        ...

    def close(self) -> None:
        """Release what was opened."""
        ...


def for_each(
    storage: Storage, work: Callable[[_Item], _Made], items: Sequence[_Item]
) -> list[_Made]:
    """Return `work(item)` for each, in their order: many at once where each waits for a store."""
    if not storage.traits.remote or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), storage.traits.read_threads)) as pool:
        try:
            return list(pool.map(work, items))
        except KeyboardInterrupt:
            storage.interrupt()  # else those who wait for the store are waited for
            raise


class Output(Protocol):
    """A file being written; nobody sees it before `publish`."""

    def write(self, begin: int, views: Sequence[memoryview]) -> None:
        """Write `views`, one after the other, from byte `begin` on. From any thread.

        Each byte once. Who is far ahead of the first byte that is missing may have to wait for it.
        """
        ...

    def stop(self) -> None:
        """Another thread failed: let those who wait in `write` give up."""
        ...

    def publish(self) -> None:
        """Make the content durable, then visible under its name, whole."""
        ...

    def discard(self) -> None:
        """Drop what was written. Harmless after `publish`."""
        ...


class Writable(Storage, Protocol):
    """Write side."""

    def strays(self) -> list[str]:
        """Return what is there and neither a regular file nor a folder: pipes, bad links, …"""
        ...

    def create(self, name: str, nbytes: int) -> Output:
        """Return an output of exactly `nbytes` bytes, under a temporary name until published."""
        ...

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write a small file, whole or not at all."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, and folders that are empty then; nothing happens if there is none."""
        ...

    def sync(self) -> None:
        """Make all that was published and removed durable."""
        ...

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be written, or None where nothing tells."""
        ...

    def lock(self, name: str | None = None) -> AbstractContextManager[None]:
        """Exclude other writers while the context is open; `TargetBusy` if there is one.

        Object stores have no lock, and exclude nobody. With `name`, exclude only who holds the
        lock on everything, and who holds that name.
        """
        ...
