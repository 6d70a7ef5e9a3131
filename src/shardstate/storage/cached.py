"""A local cache of what was read from remote storages: written through, bounded, verified on use.

Each version of each file has a folder, named by a digest of its location, name and identity, so
that `cache list` and `cache prune` know it. Each range that was read is a file in it, `BEGIN-END`,
that ends with the BLAKE3 of its bytes. Files appear whole; any process may add and remove them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from blake3 import blake3

from shardstate.digest import digest_of
from shardstate.errors import InputError
from shardstate.names import OURS
from shardstate.storage.base import Entry, PlainReader, Reader, Reading, Storage, Traits
from shardstate.storage.oserrors import mapped_errors
from shardstate.storage.views import total

_log = logging.getLogger("shardstate")

_RANGE = re.compile(r"(\d+)-(\d+)")
_DIGEST_BYTES = 32
_LOOKS = 16  # at the whole cache while as much is written as it may hold
_KEPT_SHARE = 0.9  # of the bound, after looking

Fetch = Callable[[int, Sequence[memoryview]], None]


class RangeCache:
    """A directory of ranges, of at most about `max_bytes`; shared by threads and processes."""

    def __init__(self, root: str, *, max_bytes: int) -> None:
        self._root, self._max_bytes = os.path.abspath(root), max_bytes
        self._lock = threading.Lock()
        self._unlooked = max_bytes  # bytes written since the last look: look at the first chance
        self._number = 0
        self._broken = False
        with mapped_errors("make the cache", self._root):
            os.makedirs(self._root, exist_ok=True)

    def read_into(self, key: str, begin: int, views: Sequence[memoryview], fetch: Fetch) -> None:
        """Fill `views` with the bytes of the file `key` from `begin` on: cached, else fetched."""
        goals = [view.cast("B") for view in views if view.nbytes]
        end = begin + sum(len(view) for view in goals)
        folder = os.path.join(self._root, key)
        found = self._covering(folder, begin, end)
        if found is not None and self._use(os.path.join(folder, found), begin, goals):
            return
        fetch(begin, goals)
        self._keep(folder, f"{begin}-{end}", goals)

    def _covering(self, folder: str, begin: int, end: int) -> str | None:
        """Return the name of a range that has these bytes, the exact one first."""
        exact = f"{begin}-{end}"
        if os.path.exists(os.path.join(folder, exact)):
            return exact
        try:
            names = os.listdir(folder)
        except OSError:
            return None
        for name in names:
            place = _RANGE.fullmatch(name)
            if place and int(place[1]) <= begin and end <= int(place[2]):
                return name
        return None

    def _use(self, path: str, begin: int, goals: Sequence[memoryview]) -> bool:
        """Fill `goals` from a range; False if it is gone, or damaged and removed."""
        first, last = map(int, os.path.basename(path).split("-"))
        try:
            with open(path, "rb") as file:
                raw = np.fromfile(file, dtype=np.uint8)
            os.utime(path)
            os.utime(os.path.dirname(path))
        except OSError:
            return False
        data, digest = raw[: last - first], raw[last - first :].tobytes()
        if len(data) != last - first or blake3(data.data).digest() != digest:
            _log.warning("shardstate: %s is damaged; it is removed and fetched again", path)
            with contextlib.suppress(OSError):
                os.unlink(path)
            return False
        at = begin - first
        for goal in goals:
            goal[:] = data[at : at + len(goal)].data
            at += len(goal)
        return True

    def _keep(self, folder: str, name: str, goals: Sequence[memoryview]) -> None:
        """Write a range; a cache that cannot be written is left alone from then on."""
        if self._broken:
            return
        with self._lock:
            self._number += 1
            temporary = os.path.join(folder, f"{OURS}new-{os.getpid()}-{self._number}")
        hasher = blake3()
        try:
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "xb") as file:
                for goal in goals:
                    hasher.update(goal)
                    file.write(goal)
                file.write(hasher.digest())
            os.rename(temporary, os.path.join(folder, name))
        except OSError as error:
            self._broken = True
            _log.warning("shardstate: nothing more is cached in %s: %s", self._root, error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            return
        self._bound(sum(len(goal) for goal in goals))

    def _bound(self, written: int) -> None:
        """Look at the whole cache now and then; beyond its bound remove what was used long ago."""
        with self._lock:
            self._unlooked += written
            if self._unlooked * _LOOKS < self._max_bytes:
                return
            self._unlooked = 0
            ranges = sorted(_ranges(self._root))
            total = sum(nbytes for _, nbytes, _ in ranges)
            for _, nbytes, path in ranges if total > self._max_bytes else ():
                if total <= _KEPT_SHARE * self._max_bytes:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= nbytes


def _ranges(root: str) -> Iterator[tuple[float, int, str]]:
    """Yield (last use, bytes, path) of every range; others may remove them meanwhile."""
    for folder in os.scandir(root):
        with contextlib.suppress(OSError):
            for item in os.scandir(folder.path):
                if _RANGE.fullmatch(item.name):
                    status = item.stat()
                    yield status.st_mtime, status.st_size, item.path


def cache_key(location: str, entry: Entry) -> str:
    """Return the name of the folder of one version of a file."""
    return digest_of("\0".join(map(str, (location, entry.name, *entry.identity))).encode())


class CachedStorage:
    """A remote storage behind a cache; what is listed is what the storage lists."""

    def __init__(
        self, storage: Storage, cache: RangeCache, *, reading: Reading | None = None
    ) -> None:
        self.location = storage.location
        self._reading = reading or Reading()
        self._storage, self._cache = storage, cache
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}

    @property
    def traits(self) -> Traits:
        return self._storage.traits

    def entries(self) -> dict[str, Entry]:
        return self._storage.entries()

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        return self._storage.walk(wanted)

    def size(self, name: str) -> int:
        return self._storage.size(name)

    def read(self, name: str, *, limit: int) -> bytes:
        nbytes = self.size(name)
        if nbytes > limit:
            raise InputError(
                f"{self.location}/{name}: has {nbytes} bytes, more than the {limit} that a file of "
                f"this kind may have",
                file=name,
            )
        data = bytearray(nbytes)
        self.read_into(name, 0, [memoryview(data)])
        return bytes(data)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        wanted = total(views)
        key = self._key(name)
        if key is None or not wanted or begin + wanted > self.size(name):
            self._storage.read_into(name, begin, views)
            return
        self._cache.read_into(
            key, begin, views, lambda at, into: self._storage.read_into(name, at, into)
        )

    def _key(self, name: str) -> str | None:
        """Return the folder of a file's version; None for a file below folders, or unknown."""
        with self._lock:
            if not self._keys:
                listed = self._storage.entries().values()
                self._keys = {entry.name: cache_key(self.location, entry) for entry in listed}
            return self._keys.get(name)

    def reader(self, threads: int) -> Reader:
        # Hits would be taken for the speed of the store.
        return PlainReader(self, self._reading.threads or threads)

    def expect(self, files: Mapping[str, int]) -> None:
        self._storage.expect(files)

    def map(self, name: str) -> np.ndarray:
        return self._storage.map(name)

    def interrupt(self, on: bool = True) -> None:
        self._storage.interrupt(on)

    def close(self) -> None:
        self._storage.close()
