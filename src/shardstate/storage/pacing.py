"""Chooses how to read what is not in the page cache, from the throughput seen.

The best way differs fourfold between machines, and no setting is right on all of them. So each of a
few ways is tried on some tens of megabytes, the most promising first; then the best of them has the
rest, and now and then another one is tried again. What was learnt is kept for the device as long as
the process lives.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

TRIAL_BYTES = 48 << 20  # a way is judged by so much
TRIAL_SECONDS = 0.02  # and by no less time than that
_HOPELESS = 0.6  # below this share of the best, a trial ends after a fourth of it
_AGAIN_BYTES = 2 << 30  # so much after the last trial, another way is tried again


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read."""

    threads: int  # reads in flight
    direct: bool  # past the page cache

    def __str__(self) -> str:
        return f"{'direct' if self.direct else 'buffered'} × {self.threads}"


@dataclass
class Pacer:
    """The ways, what each of them gave, and the one that is used now."""

    ways: Sequence[Way]
    known: dict[Way, float] = field(default_factory=dict)  # bytes a second
    way: Way = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _warming: int = field(init=False)  # reads that still began under the way before
    _began: float | None = field(default=None, init=False)
    _bytes: int = field(default=0, init=False)
    _on_trial: bool = field(init=False)

    def __post_init__(self) -> None:
        self.way = self._next()
        self._warming = 0

    def done(self, way: Way, nbytes: int, now: float) -> None:
        """Hear that a read of `nbytes`, begun `way`, ended at `now` (seconds of any clock)."""
        with self._lock:
            if way != self.way:
                return
            if self._warming:
                self._warming -= 1
                return
            if self._began is None:
                self._began = now
                return
            self._bytes += nbytes
            seconds = now - self._began
            if not self._on_trial:
                if self._bytes >= _AGAIN_BYTES:
                    self.known[way] = self._bytes / seconds
                    self._try(self._least_known())
                return
            if seconds < TRIAL_SECONDS:
                return
            rate = self._bytes / seconds
            best = max(self.known.values(), default=0.0)
            if self._bytes >= TRIAL_BYTES or (
                self._bytes >= TRIAL_BYTES // 4 and rate < _HOPELESS * best
            ):
                # Not the newest alone: one trial is short, and disks are fickle.
                before = self.known.pop(way, rate)
                self.known[way] = (before + rate) / 2
                self._try(self._next())

    def choose_from(self, ways: Sequence[Way]) -> None:
        """Keep to `ways` from now on."""
        with self._lock:
            self.ways = ways
            if self.way not in ways:
                self._try(self._next())

    def _next(self) -> Way:
        """Return a way that was not tried yet, or else the best."""
        for way in self.ways:
            if way not in self.known:
                self._on_trial = len(self.ways) > 1
                return way
        self._on_trial = False
        return max(self.ways, key=lambda way: self.known[way])

    def _least_known(self) -> Way:
        """Return the way whose trial is the oldest."""
        self._on_trial = True
        return next(way for way in self.known if way in self.ways)

    def _try(self, way: Way) -> None:
        self._warming = 0 if way == self.way else way.threads
        self.way, self._began, self._bytes = way, None, 0
