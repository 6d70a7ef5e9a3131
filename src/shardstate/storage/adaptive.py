"""Reads of local files that find out, while they run, which way is the fastest.

What is in the page cache is read through it: nothing is cheaper. For the rest `Pacer` chooses how
many reads are in flight, and whether they go past the page cache. While another process reads the
same files, all go through it: then the disk delivers each byte about once for all of them, because
whoever comes second finds it cached, or waits for the same page.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardstate.buffers import PAGE_BYTES, Rooms
from shardstate.storage.base import Arrived, Reader, Runs
from shardstate.storage.direct import DirectFile, alignment_of
from shardstate.storage.gather import MappedFile
from shardstate.storage.pacing import Pacer, Way
from shardstate.storage.residency import Resident, probe_of
from shardstate.storage.tries import Stopped
from shardstate.storage.views import first_of, parts_of, rest_of, total

if TYPE_CHECKING:
    from shardstate.storage.local import LocalStorage

_log = logging.getLogger("shardstate")

MOST_THREADS = 16
_DIRECT = (Way(MOST_THREADS, True), Way(8, True, 4 << 20), Way(4, True))
_BUFFERED = (Way(2, False), Way(8, False, 4 << 20))
_UNIT_BYTES = 1 << 20  # looked at together, where no way was chosen yet
# Where somebody looks at what arrives: most of it is in the processor's cache still.
_FOLLOWED_BYTES = 1 << 20
_SURE_HITS = 4  # reads in a row that found all cached: the next one is taken for such a one
_MANY_HITS = 32  # reads in a row that found all cached: reading ahead does not do that
_LOOK_SECONDS = 0.2  # how often others are looked for

_learnt: dict[int, dict[Way, float]] = {}  # by device, for as long as the process lives


class AdaptiveReader(Reader):
    """Reads files of one local directory, for one execution."""

    def __init__(self, storage: LocalStorage, threads: int) -> None:
        reading = storage.reading
        fixed, direct = reading.threads is not None, reading.direct
        threads = reading.threads or threads
        self._storage, self._threads, self._fixed = storage, threads, fixed
        ways = [w for w in (*_DIRECT, *_BUFFERED) if direct is None or w.direct == direct]
        if fixed:
            ways = list(dict.fromkeys(Way(threads, way.direct, way.unit_bytes) for way in ways))
        self._ways, self._asked = ways, direct
        self._pacer: Pacer | None = None
        self._resident: dict[str, Resident] = {}
        self._files: dict[str, DirectFile | None] = {}
        self._mapped: dict[str, MappedFile] = {}
        self._gathers = self._asked is not True  # until that fails
        self._rooms = {way.unit_bytes: Rooms(way.unit_bytes) for way in ways}
        self._stopped = threading.Event()
        self._hits = 0  # reads since the last one that found bytes that were not cached
        self._announced: set[str] = set()  # files that others can see us read
        self._looked = 0.0
        self.threads = threads if fixed else max(threads, *(way.threads for way in ways))

    @property
    def limit(self) -> int:
        """How many reads are to be in flight now."""
        pacer = self._pacer
        if self._fixed or pacer is None or self._hits >= _MANY_HITS:
            return self._threads
        return pacer.way.threads

    def read_into(
        self,
        name: str,
        begin: int,
        views: Sequence[memoryview],
        arrived: Arrived | None = None,
    ) -> int:
        """Fill `views`, one after the other, from byte `begin` on; return the bytes cached before.

        All of them or `TruncatedFile`. Tells `arrived` while it goes on.
        """
        first, cached, nbytes = begin, 0, total(views)
        if not nbytes:
            return 0
        # Where so much was cached, asking first would cost more than it can save.
        if self._asked is not True and (
            self._hits >= _SURE_HITS or self._was_cached(name, begin, begin + nbytes)
        ):
            cached = self._read_resident(name, begin, views, arrived)
            if cached == nbytes:
                self._hits += 1
                return cached
            begin, views = begin + cached, rest_of(views, cached)
        while views:
            if self._stopped.is_set():
                raise Stopped
            unit = _UNIT_BYTES if self._pacer is None else self._pacer.way.unit_bytes
            part = first_of(views, unit - begin % PAGE_BYTES)
            cached += self._read(name, begin, part)
            done = total(part)
            begin, views = begin + done, rest_of(views, done)
            if arrived is not None:
                arrived(begin - first)
        self._hits = self._hits + 1 if cached == nbytes else 0
        return cached

    def gather(self, name: str, begin: int, end: int, runs: Sequence[Runs]) -> bool:
        if not self._gathers or not self._was_cached(name, begin, end):
            return False
        try:
            self._mapping(name).gather(runs)
        except OSError as error:
            with self._storage.opening:  # another thread may fail as well
                first, self._gathers = self._gathers, False
            if first:
                _log.info(
                    "shardstate: %s/%s: rows are read with what lies between them: %s",
                    self._storage.location,
                    name,
                    error,
                )
            return False
        self._hits += 1
        return True

    def _mapping(self, name: str) -> MappedFile:
        with self._storage.opening:
            if name not in self._mapped:
                self._mapped[name] = MappedFile(self._storage.descriptor(name))
            return self._mapped[name]

    def _read_resident(
        self, name: str, begin: int, views: Sequence[memoryview], arrived: Arrived | None
    ) -> int:
        """Read what the page cache holds from there on; return how much that was."""
        if arrived is None:
            return self._storage.read_resident(name, begin, views)
        done = 0
        for part in parts_of(views, _FOLLOWED_BYTES):
            found = self._storage.read_resident(name, begin + done, part)
            done += found
            arrived(done)
            if found < total(part):
                break
        return done

    def _read(self, name: str, begin: int, views: Sequence[memoryview]) -> int:
        """Read what was cached from there, else the way that the pacer says; return how much was
        cached.
        """
        if self._asked is not True and self._was_cached(name, begin, begin + total(views)):
            there = self._storage.read_resident(name, begin, views)
            # It is there and yet waited for: just written, say, or no such read in a file system.
            self._storage.read_into(name, begin + there, rest_of(views, there))
            return there
        pacer = self._pacer or self._paced(name)
        self._look(pacer, name)
        way, began = pacer.way, time.perf_counter()
        if not (way.direct and self._read_direct(name, begin, views, way)):
            self._storage.read_into(name, begin, views)
        now = time.perf_counter()
        pacer.done(way, total(views), now - began, now)
        return 0

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        """Close what was opened for this execution."""
        for file in self._files.values():
            if file is not None:
                os.close(file.fd)
        self._files.clear()
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()
        for name in self._announced:
            with contextlib.suppress(OSError):
                fcntl.flock(self._storage.descriptor(name), fcntl.LOCK_UN)
        self._announced.clear()

    def _was_cached(self, name: str, begin: int, end: int) -> bool:
        """Return whether bytes were cached before this execution came near them."""
        if name not in self._resident:
            fd = self._storage.descriptor(name)
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self._announced.add(name)
            with contextlib.suppress(OSError):
                os.pread(fd, 1, 0)  # a probe must see this
            self._resident[name] = Resident(probe_of(fd), self._storage.size(name))
        return self._resident[name](begin, end)

    def _paced(self, name: str) -> Pacer:
        fd = self._storage.descriptor(name)
        device = os.fstat(fd).st_dev
        with self._storage.opening:
            if self._pacer is None:
                self._pacer = Pacer(self._ways, _learnt.setdefault(device, {}))
        return self._pacer

    def _look(self, pacer: Pacer, name: str) -> None:
        """Go through the page cache while other processes read the same files."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS or self._asked is not None:
            return
        self._looked = now
        alone = name not in self._announced or readers_of(self._storage.descriptor(name)) <= 1
        ways = self._ways if alone else [way for way in self._ways if not way.direct]
        if ways != list(pacer.ways):
            pacer.choose_from(ways)

    def _read_direct(self, name: str, begin: int, views: Sequence[memoryview], way: Way) -> bool:
        """Read past the page cache; False where this file cannot be read so."""
        file = self._file(name)
        if file is None:
            return False
        nbytes = total(views)
        try:
            with self._storage.mapped(name):
                found = file.read_into(begin, views, self._rooms[way.unit_bytes])
        except OSError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno != errno.EINVAL:
                raise
            self._refused(name, "the file system wants another alignment than it says")
            return False
        if found < nbytes:
            raise self._storage.truncated(name, begin + found, nbytes - found)
        return True

    def _file(self, name: str) -> DirectFile | None:
        if name in self._files:
            return self._files[name]
        buffered = self._storage.descriptor(name)
        with self._storage.opening:
            if name in self._files:
                return self._files[name]
            alignment = alignment_of(buffered)
            fd = -1
            if alignment is not None:
                # The same file even if its name leads to another one by now.
                with contextlib.suppress(OSError):
                    flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                    fd = os.open(f"/proc/self/fd/{buffered}", flags)
            if fd < 0 or alignment is None:
                self._refused(name, "its file system refuses O_DIRECT")
                return None
            self._files[name] = DirectFile(fd, *alignment)
            return self._files[name]

    def _refused(self, name: str, why: str) -> None:
        if not any(file is None for file in self._files.values()):
            _log.info(
                "shardstate: %s/%s is read through the page cache: %s",
                self._storage.location,
                name,
                why,
            )
        self._files[name] = None
        self._ways = [way for way in self._ways if not way.direct] or [Way(self._threads, False)]
        if self._pacer is not None:
            self._pacer.choose_from(self._ways)


def readers_of(fd: int) -> int:
    """Return how many processes say that they read this file, this one included."""
    inode = f":{os.fstat(fd).st_ino} "
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            return sum("FLOCK" in line and "READ" in line and inode in line for line in locks)
    except OSError:
        return 1
