"""Executes reads: the only threads of the library, bounded memory, progress, counters.

Every worker takes the next read, fetches its bytes into staging memory (or straight into the
destination) and hands them to the target, which moves, hashes and writes them in the same thread.
With a few workers these overlap. How many of them work is the choice of the storage's reader, who
may change it at any time, as far as `STAGING_BYTES` allow; the others wait.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardstate.buffers import PAGE_BYTES, staging_buffer
from shardstate.coalesce import Read
from shardstate.errors import OutOfMemory
from shardstate.meter import MemoryMeter
from shardstate.storage import Reader, Storage
from shardstate.targets import Direct, Target

MEMORY_BYTES = 256 << 20  # beyond the destination, for all threads together
# What is read and does not go straight into its destination: as much again is there when it is put
# in order, cast, or grows by a cast.
STAGING_BYTES = MEMORY_BYTES // 4
_TICK_SECONDS = 0.02  # how often memory is sampled
_PROGRESS_SECONDS = 0.1  # between two calls of `progress`

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Counters:
    """What an execution did."""

    bytes_read: int  # payload asked of the storage
    bytes_cached: int  # what of it the page cache held
    requests: int
    peak_extra_bytes: int


class _Turn(NamedTuple):
    """A read that a worker has taken, and the memory that its bytes go to."""

    read: Read
    direct: Direct | None  # None: it must be staged
    room: np.ndarray | None  # staging memory of an earlier read


class _Run:
    """State that the workers of one execution share."""

    def __init__(
        self, reads: Sequence[Read], reader: Reader, target: Target, *, fills_memory: bool
    ) -> None:
        self.reads, self.reader, self.target = reads, reader, target
        self.fills_memory = fills_memory
        self.lock = threading.Lock()
        self.free = threading.Condition(self.lock)  # a worker ended its read
        self.busy = 0  # workers that carry out a read
        self.waiting = 0  # workers that wait until they may
        self.stopped = threading.Event()
        self.idle = threading.Event()  # set when the last worker is done, or none is needed
        if not reads:
            self.idle.set()
        self.alert = threading.Event()  # set with it, and when another worker is needed
        self.hired = self.left = 0  # workers that there were, and that are done
        self.next = 0
        self.error: BaseException | None = None
        self.bytes_read = 0
        self.bytes_cached = 0
        self.requests = 0
        self.touched = 0  # bytes of destination memory that were filled for the first time
        self.held = 0  # bytes of staging memory that reads in flight fill
        self.spare: list[np.ndarray] = []  # staging memory for the next ones

    def take(self) -> _Turn | None:
        """Return the next read once there is room for one more in flight; None: no more."""
        with self.free:
            while not self.stopped.is_set() and self.next < len(self.reads):
                if self.busy < self.reader.limit:
                    read = self.reads[self.next]
                    direct = self.target.direct(read)
                    # In the order of the reads, since later ones may wait for earlier ones.
                    staged = read.nbytes if direct is None else 0
                    if not staged or self._fits(read):
                        break
                self.waiting += 1
                self.free.wait()
                self.waiting -= 1
            else:
                return None
            self.next += 1
            self.busy += 1
            self.held += staged
            room = self.spare.pop() if staged and self.spare else None
            if self.next == len(self.reads):
                self.free.notify_all()  # nothing is left for those who wait
            elif self.busy < self.reader.limit and (
                direct is not None or self._fits(self.reads[self.next])
            ):
                # One more can go on, and calls the next one in its turn.
                if self.waiting:
                    self.free.notify()
                elif self.hired - self.left < self.most:
                    self.alert.set()
        return _Turn(read, direct, room)

    def _fits(self, read: Read) -> bool:
        """Whether there is staging memory for one more."""
        return not self.held or self.held + read.nbytes <= STAGING_BYTES

    def done(self, read: Read, room: np.ndarray | None, cached: int, *, staged: bool) -> None:
        """Count a read that was carried out, and let another one begin, perhaps in its `room`."""
        touched = sum(piece.nbytes for piece in read.pieces) if self.fills_memory else 0
        with self.free:
            self.bytes_read += read.nbytes
            self.bytes_cached += cached
            self.requests += read.file is not None
            self.touched += touched
            self.held -= read.nbytes if staged else 0
            if room is not None and self.held + sum(map(len, self.spare)) < STAGING_BYTES:
                self.spare.append(room)
            # Nobody is woken for this place: whoever leaves it comes back for it at once, and a
            # thread that wakes up for nothing takes the processor from one that copies.
            self.busy -= 1

    def gathered(self, read: Read) -> bool:
        """Whether a read needed no staging after all, since a cache held it."""
        if read.file is None or (runs := self.target.runs(read)) is None:
            return False
        return self.reader.gather(read.file, read.begin, read.end, runs)

    @property
    def most(self) -> int:
        """How many workers there may be now."""
        return min(self.reader.threads, self.reader.limit)

    def hire(self) -> bool:
        """Count one more worker; False where none is needed now."""
        with self.lock:
            enough = self.hired - self.left >= self.most or self.waiting
            if enough or self.idle.is_set() or self.next == len(self.reads):
                return False
            self.hired += 1
            return True

    def leave(self) -> None:
        """Count one worker that is done."""
        with self.lock:
            self.left += 1
            if self.left == self.hired:
                self.idle.set()
                self.alert.set()

    def stop(self, error: BaseException | None = None) -> None:
        """Let nobody take another read; the first error is kept."""
        with self.free:
            if self.error is None:
                self.error = error
            self.stopped.set()
            self.free.notify_all()


def execute(
    reads: Sequence[Read],
    *,
    storage: Storage,
    target: Target,
    threads: int,
    progress: Progress | None,
    fills_memory: bool,
) -> Counters:
    """Carry out `reads` and return what it took; the first error of any worker is raised.

    `threads` work at once where nothing has to be waited for; how many elsewhere, the storage's
    reader says. `fills_memory`: the target allocates what it receives, so that resident memory
    grows by the bytes delivered; they do not count as extra. Ctrl-C stops all workers before it is
    raised.
    """
    total = sum(read.nbytes for read in reads)
    expected: Counter[str] = Counter()
    for read in reads:
        if read.file is not None:
            expected[read.file] += read.nbytes
    storage.expect(expected)
    reader = storage.reader(threads)
    run = _Run(reads, reader, target, fills_memory=fills_memory)
    workers: list[threading.Thread] = []
    meter = MemoryMeter()
    try:
        reported = time.monotonic()
        # Not worker.join: in Python 3.11 an interrupt there makes a running thread look finished.
        while not run.idle.is_set():
            run.alert.clear()
            while run.hire():
                name = f"shardstate-{len(workers)}"
                worker = threading.Thread(
                    target=_work, args=(run, storage, target), name=name, daemon=True
                )
                workers.append(worker)
                worker.start()
            if not run.idle.is_set() and not run.alert.wait(_TICK_SECONDS):
                meter.sample(run.touched)
            now = time.monotonic()
            if progress is not None and now - reported >= _PROGRESS_SECONDS:
                reported = now
                progress(run.bytes_read, total)
    finally:
        run.stop()
        if not run.idle.is_set():
            target.stop()
            reader.stop()
            with run.lock:
                run.hired = sum(worker.ident is not None for worker in workers)
            if run.left < run.hired:
                run.idle.wait()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        reader.close()
    if run.error is not None:
        raise run.error
    meter.sample(run.touched)
    if progress is not None:
        progress(total, total)
    return Counters(run.bytes_read, run.bytes_cached, run.requests, meter.peak)


def _work(run: _Run, storage: Storage, target: Target) -> None:
    """Carry out reads until there are none, or until another worker failed."""
    turn: _Turn | None = None
    try:
        while (turn := run.take()) is not None:
            read, direct, room = turn
            staged, cached = None, 0
            if direct is None and run.gathered(read):
                cached = read.nbytes
            elif read.file is not None:
                if direct is None:
                    # As far from a page as in the file: what O_DIRECT wants, without a copy.
                    first = read.begin % PAGE_BYTES
                    if room is None or len(room) < first + read.nbytes:
                        room = staging_buffer(PAGE_BYTES + read.nbytes)
                    staged = room[first : first + read.nbytes]
                    direct = Direct([staged.data], None)
                cached = run.reader.read_into(read.file, read.begin, direct.views, direct.arrived)
                if direct.arrived is not None:
                    direct.arrived(read.nbytes)
            if run.stopped.is_set():
                return
            target.accept(read, staged)
            run.done(read, room, cached, staged=turn.direct is None)
            turn = None
    except BaseException as error:
        run.stop(_named(error, turn, storage) if isinstance(error, MemoryError) else error)
        target.stop()
        run.reader.stop()
    finally:
        run.leave()


def _named(error: MemoryError, turn: _Turn | None, storage: Storage) -> MemoryError:
    """Say of a MemoryError where it struck; whoever knows what was to be had may say more."""
    if isinstance(error, OutOfMemory) or turn is None:
        return error
    read = turn.read
    what = "values of the plan" if read.file is None else f"bytes {read.begin} to {read.end}"
    name = storage.location if read.file is None else f"{storage.location}/{read.file}"
    named = OutOfMemory(
        f"{name}: memory ran out at {what}; free some, or use fewer threads", file=read.file
    )
    named.__cause__ = error
    return named
