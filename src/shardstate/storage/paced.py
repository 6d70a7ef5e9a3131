"""Reads of a store that find out, while they run, how many of them are best in flight.

What a store gives by one connection, and from where on more of them slow it down, differs by far
between stores, and between hours. Latency alone tells where to begin: `Pacer` tries twice and half
as many, and keeps to what was best.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from shardstate.storage.base import Arrived, PlainReader, Reader, Reading, Storage
from shardstate.storage.pacing import Pacer, Way
from shardstate.storage.views import total

_TRIAL_BYTES = 256 << 20  # a request has some MiB, and there are tens of them in flight
_MOST_REQUESTS = 128

# By scheme and host or bucket, for as long as the process lives.
_learnt: dict[str, dict[Way, float]] = {}


class PacedReader(PlainReader):
    """Reads of one execution, with about `threads` of them in flight."""

    def __init__(self, storage: Storage, threads: int) -> None:
        counts = dict.fromkeys((threads, min(2 * threads, _MOST_REQUESTS), max(threads // 2, 1)))
        super().__init__(storage, max(counts))
        self._lock = threading.Lock()
        self._busy = 0  # reads in flight
        self._pacer = Pacer(
            [Way(count, direct=False) for count in counts],
            _learnt.setdefault("/".join(storage.location.split("/")[:3]), {}),
            trial_bytes=_TRIAL_BYTES,
            warm_up=1,
        )

    @property
    def limit(self) -> int:
        return self._pacer.way.threads

    def read_into(
        self,
        name: str,
        begin: int,
        views: Sequence[memoryview],
        arrived: Arrived | None = None,
    ) -> int:
        with self._lock:
            self._busy += 1
            busy = self._busy
        way, began = self._pacer.way, time.perf_counter()
        super().read_into(name, begin, views)
        now = time.perf_counter()
        with self._lock:
            mean = (busy + self._busy) / 2
            self._busy -= 1
        # As if all of the way had been in flight, which memory for staging may not allow.
        self._pacer.done(way, total(views), (now - began) * way.threads / mean, now)
        return 0


def reader_of(storage: Storage, threads: int, reading: Reading) -> Reader:
    """Return what reads a store for one execution; `threads` that a caller decided on are kept."""
    if reading.threads is not None:
        return PlainReader(storage, reading.threads)
    return PacedReader(storage, threads)
