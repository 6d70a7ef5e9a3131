"""Tries of one request: back-off with jitter, until nothing came for too long."""

from __future__ import annotations

import random
import threading
import time

from shardstate.errors import ShardStateError
from shardstate.storage.faults import Fault, diagnose, error_of

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds
_UNREACHED_SECONDS = 15.0  # an endpoint that never answered is given up after that


class Stopped(Exception):
    """Another thread failed, or Ctrl-C: whoever waits here gives up."""


class Health:
    """What the requests to one endpoint have in common."""

    def __init__(self) -> None:
        self.answered = False  # whether it ever did
        self.stopped = threading.Event()

    def interrupt(self, on: bool) -> None:
        """Let those who wait give up, or no more."""
        if on:
            self.stopped.set()
        else:
            self.stopped.clear()


class Tries:
    """The tries of one operation. After each failure, `failed` waits, or raises the one error.

    An operation goes on for `timeout` seconds after the last time it came forward.
    """

    def __init__(
        self, health: Health, *, what: str, where: str, name: str | None, timeout: float
    ) -> None:
        self._health = health
        self._what, self._where, self._name = what, where, name
        self._timeout = timeout
        self._since = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._began = 0.0
        self.number = 0

    def begin(self) -> None:
        """Count a try."""
        if self._health.stopped.is_set():
            raise Stopped
        self.number += 1
        self._began = time.monotonic()

    def advance(self) -> None:
        """Note that something came: the clock starts again."""
        self._since = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._health.answered = True
        if self._health.stopped.is_set():
            raise Stopped

    def failed(self, error: Exception) -> None:
        """Wait before the next try, or raise what the operation ends with."""
        if isinstance(error, (ShardStateError, Stopped)):
            raise error
        fault = diagnose(error)
        now = time.monotonic()
        if fault.cause.startswith("HTTP"):
            self._health.answered = True
        if fault.kind == "failed":
            limit = self._timeout
            if not self._health.answered:
                limit = min(limit, _UNREACHED_SECONDS)
            pause = self._pause * random.uniform(0.5, 1.5)
            if now + pause < self._since + limit:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE, self._timeout / 8)
                if self._health.stopped.wait(pause):
                    raise Stopped from None
                return
            fault = self._gave_up(fault, now)
        # Not chained: the client's text holds addresses that are signed.
        raise error_of(fault, what=self._what, where=self._where, name=self._name) from None

    def _gave_up(self, fault: Fault, now: float) -> Fault:
        tries = f"{self.number} {'try' if self.number == 1 else 'tries'}"
        cause = f"{fault.cause} ({tries}, {now - self._since:.3g} s without progress)"
        return Fault(fault.kind, cause, fault.advice)

    @property
    def seconds(self) -> float:
        """How long this try takes already."""
        return time.monotonic() - self._began
