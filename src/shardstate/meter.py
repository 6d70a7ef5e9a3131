"""Resident memory of this process, as `peak_extra_bytes` counts it."""

from __future__ import annotations

import re

_FIELDS = re.compile(rb"^(?:RssAnon|RssShmem):\s+(\d+) kB$", re.MULTILINE)


def resident_bytes() -> int:
    """Return RssAnon + RssShmem of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", "rb", buffering=0) as status:
            return sum(int(kib) for kib in _FIELDS.findall(status.read())) * 1024
    except OSError:
        return 0


class MemoryMeter:
    """The most memory beyond what was there at the start and beyond the destination."""

    def __init__(self) -> None:
        self._start = resident_bytes()
        self.peak = 0

    def sample(self, destination_bytes: int) -> None:
        """Look now; `destination_bytes` of the growth belong to the result."""
        extra = resident_bytes() - self._start - destination_bytes
        self.peak = max(self.peak, extra)
