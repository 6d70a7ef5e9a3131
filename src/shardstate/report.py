"""What every operation returns: one set of fields, the keys of `--json`; absent ones are None."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    file: str  # relative to the checkpoint
    tensor: str | None
    problem: str  # in words: what was expected, what was found, what to do
    kind: str  # header, size, missing, extra, digest, rank, stale or source
    begin: int | None = None  # bytes from the start of the file
    end: int | None = None


@dataclass(kw_only=True)
class Report:
    """Figures of one operation, or of the plan for it. Sizes are bytes, times seconds.

    `docs/architecture.md` says what each figure counts.
    """

    bytes: int | None = None
    padding_bytes: int | None = None
    bytes_wanted: int | None = None
    bytes_read: int | None = None
    bytes_cached: int | None = None
    bytes_written: int | None = None
    bytes_meta: int | None = None
    seconds: float | None = None
    phases: Mapping[str, float] | None = None
    gbps: float | None = None
    hashing: float | None = None  # seconds of all threads together, where digests were compared
    peak_extra_bytes: int | None = None
    tensors: int | None = None
    files: int | None = None
    requests: int | None = None
    materialised: int | None = None
    materialised_bytes: int | None = None
    kind: str | None = None
    layout: str | None = None
    stage: str | None = None
    dtype: str | None = None
    topology: Mapping[str, int] | None = None
    ranks: tuple[int, ...] | None = None
    set: str | None = None
    committed: bool | None = None
    digest: str | None = None  # of the manifest: what `verify --digest` takes
    signed_by: str | None = None  # the public key that was required, and did sign the set
    bytes_by_dtype: Mapping[str, int] | None = None
    bytes_by_rank: Mapping[str, int] | None = None
    tensor_list: tuple[Mapping[str, Any], ...] | None = None
    file_list: tuple[Mapping[str, Any], ...] | None = None
    problems: tuple[Problem, ...] | None = None
    measured: tuple[Mapping[str, Any], ...] | None = None  # by `bench`: who, how, GB/s
    by_rule: tuple[Mapping[str, Any], ...] | None = None  # how a plan shares: tensors and bytes
    notes: tuple[str, ...] | None = None  # worth knowing, and no problem

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Phases:
    """Wall-clock intervals that follow each other without gap or overlap."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time since the last phase ended as `name`, until the context is left."""
        try:
            yield
        finally:
            now = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
            self._began = now

    def finish(self, report: Report, *, main: str | None) -> Report:
        """Write times into `report`; `gbps` is what was read or written by the phase `main`."""
        report.phases = self.seconds
        report.seconds = sum(self.seconds.values())
        moved = report.bytes if report.bytes_written is None else report.bytes_written
        elapsed = 0.0 if main is None else self.seconds.get(main, 0.0)
        if moved and elapsed > 0:
            report.gbps = moved / elapsed / 1e9
        return report
