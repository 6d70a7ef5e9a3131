"""Chooses how to read what is not in the page cache, from the throughput seen.

The best way differs fourfold between machines, and no setting is right on all of them. So each of a
few ways is tried on some tens of megabytes, the most promising first; then the best of them has the
rest. It is watched: where it falls behind what another one gave, that one has the next bytes; and
now and then another one is tried again. What was learnt is kept for the device as long as the
process lives.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

TRIAL_BYTES = 48 << 20  # a way is judged by so much
TRIAL_SECONDS = 0.02  # and by no less time than that
_HOPELESS = 0.6  # below this share of the best, a trial ends after a fourth of it
_AS_GOOD = 0.8  # a trial tells no finer: from this share of the best on, the first in order is used
_WATCH_BYTES = 256 << 20  # so often the choice is thought over
_AGAIN_BYTES = 2 << 30  # so much after the last trial, another way is tried again

_LOCK = threading.Lock()  # of all of them: they share what they know


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read."""

    threads: int  # reads in flight
    direct: bool  # past the page cache
    unit_bytes: int = 1 << 20  # of one of them

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{how} {self.threads} × {self.unit_bytes >> 20} MiB"


@dataclass
class Pacer:
    """The ways, the most promising first, what each of them gave, and the one that is used now.

    Reads end in bursts of as many as are in flight, so bytes by time say little of a short trial.
    Little's law does: throughput is the bytes in flight by the time that each of them takes.
    """

    ways: Sequence[Way]
    known: dict[Way, float] = field(default_factory=dict)  # bytes a second
    trial_bytes: int = TRIAL_BYTES
    warm_up: int = 3  # reads by each thread before the first trial
    way: Way = field(init=False)
    _on_trial: bool = field(init=False)
    _warming: int = field(init=False)  # reads that ramp up, or began the way before
    _since: float = field(default=0.0, init=False)  # when the last of these ended; from then on:
    _bytes: int = field(default=0, init=False)  # of the reads that ended
    _seconds: float = field(default=0.0, init=False)  # that these took, together
    _settled: int = field(default=0, init=False)  # bytes read since the last trial

    def __post_init__(self) -> None:
        with _LOCK:
            self.way = self._next()
        # Threads start, and memory is touched for the first time.
        self._warming = self.warm_up * self.way.threads

    def done(self, way: Way, nbytes: int, seconds: float, now: float) -> None:
        """Hear that a read of `nbytes` took so long and ended at `now` (seconds of any clock)."""
        with _LOCK:
            if way != self.way:
                return
            if self._warming:
                self._warming -= 1
                self._since = now
                return
            self._bytes += nbytes
            self._seconds += seconds
            if self._on_trial or self._bytes >= _WATCH_BYTES:
                self._judge(now)

    def choose_from(self, ways: Sequence[Way]) -> None:
        """Keep to `ways` from now on."""
        with _LOCK:
            self.ways = ways
            if self.way not in ways:
                self._try(self._next(), self._since)

    def _judge(self, now: float) -> None:
        if now - self._since < TRIAL_SECONDS:
            return
        rate = self.way.threads * self._bytes / self._seconds
        best = max(self.known.values(), default=0.0)
        hopeless = self._bytes >= self.trial_bytes // 4 and rate < _HOPELESS * best
        if self._bytes < self.trial_bytes and not hopeless:
            return
        # Not the newest alone: one trial is short, and disks are fickle.
        before = self.known.pop(self.way, rate)
        self.known[self.way] = (before + rate) / 2
        self._settled = 0 if self._on_trial else self._settled + self._bytes
        again = self._settled >= _AGAIN_BYTES
        self._try(self._least_known() if again else self._next(), now)

    def _next(self) -> Way:
        """Return a way that was not tried yet, or else the best."""
        for way in self.ways:
            if way not in self.known:
                self._on_trial = len(self.ways) > 1
                return way
        self._on_trial = False
        enough = _AS_GOOD * max(self.known[way] for way in self.ways)
        return next(way for way in self.ways if self.known[way] >= enough)

    def _least_known(self) -> Way:
        """Return the way whose trial is the oldest."""
        self._on_trial = True
        return next(way for way in self.known if way in self.ways)

    def _try(self, way: Way, now: float) -> None:
        self._warming = 0 if way == self.way else way.threads
        self.way, self._since = way, now
        self._bytes, self._seconds = 0, 0.0
