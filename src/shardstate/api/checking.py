"""Operations that check: verify."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shardstate.api.planning import (
    open_path,
    reads_of,
    sizes_of,
)
from shardstate.engine import Counters, Progress, execute
from shardstate.errors import (
    UsageError,
)
from shardstate.findings import Verification
from shardstate.names import MANIFEST, record_rank
from shardstate.plan import (
    Plan,
)
from shardstate.report import Phases, Report
from shardstate.storage import Access, Storage, storage_at
from shardstate.targets import CompareTarget, DigestTarget
from shardstate.verify import verify_set, verify_structure


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    against: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] | None = None,
    pattern: str | None = None,
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a checkpoint and return all `problems`; none means that it is sound.

    Sizes, names, headers, JSON files and companions always; `full` hashes all data too; `against`
    implies `full` and compares every copy and fill with the source the set was made from. On
    vLLM's own sets and on ordinary checkpoints only the structure can be checked.
    """
    phases = Phases()
    report = Report(bytes_wanted=0)
    figures: list[tuple[Counters, int]] = []  # of each pass, and what it read of the set beside

    def carry_out(
        plans: Sequence[Plan],
        storage: Storage,
        target: DigestTarget | CompareTarget,
        wanted: Sequence[frozenset[int]] | None,
    ) -> None:
        workers = threads or storage.traits.read_threads
        counters = execute(
            reads_of(
                plans, max_gap_bytes=storage.traits.max_gap_bytes, threads=workers, wanted=wanted
            ),
            storage=storage,
            target=target,
            threads=workers,
            progress=progress,
            fills_memory=False,
        )
        compared = target.bytes_read if isinstance(target, CompareTarget) else 0
        figures.append((counters, compared))

    storage, source = storage_at(path, access or Access()), None
    try:
        with phases("open"):
            names = storage.entries()
            is_set = MANIFEST in names or any(record_rank(name) is not None for name in names)
            source = open_path(against, access=access) if against is not None else None
            if source is not None and source.catalog is None:
                raise UsageError(f"{against}: is no ordinary checkpoint to compare with")
        with phases("read"):
            if is_set:
                found = verify_set(
                    storage,
                    ranks=_checked_ranks(ranks),
                    full=full or source is not None,
                    source=source,
                    execute=carry_out,
                )
                report.kind = "shardstate"
            else:
                if source is not None:
                    raise UsageError(
                        f"{storage.location}: no provenance is recorded there; leave --against out"
                    )
                chosen = _checked_ranks(ranks)
                report.kind, found = verify_structure(storage, pattern=pattern, ranks=chosen)
    finally:
        storage.close()
        if source is not None:
            source.close()
    report.bytes_read = sum(counters.bytes_read + more for counters, more in figures)
    report.requests = sum(counters.requests for counters, _ in figures)
    report.peak_extra_bytes = max((c.peak_extra_bytes for c, _ in figures), default=0)
    info = found.info
    if info is not None and pattern not in (None, info.pattern):
        raise UsageError(f"pattern {pattern!r} contradicts the set's {info.pattern!r}")
    _verified(report, found, is_set and (full or source is not None))
    return phases.finish(report, main="read" if report.bytes_read else None)


def _verified(report: Report, found: Verification, full: bool) -> None:
    report.bytes = found.bytes
    report.bytes_meta = found.bytes_meta
    if full:
        report.bytes_wanted = found.bytes
    report.tensors = found.tensors
    report.file_list = tuple(
        {"name": name, "bytes": nbytes, "rank": rank} for name, nbytes, rank in found.files
    )
    report.files = len(found.files)
    report.ranks = tuple(sorted(found.records)) or None
    report.problems = tuple(found.problems)
    report.notes = tuple(found.notes)
    report.materialised, report.materialised_bytes = found.opaque, found.opaque_bytes
    if (info := found.info) is not None:
        report.layout, report.stage, report.dtype = info.layout, info.stage, info.dtype
        report.topology = sizes_of(info.shape)
        report.committed = found.manifest is not None
    if found.manifest is not None:
        report.set = found.manifest.set


def _checked_ranks(ranks: Sequence[int] | None) -> Sequence[int] | None:
    if ranks is not None and (not ranks or min(ranks) < 0):
        raise UsageError(f"ranks {list(ranks)}: expected at least one rank, 0 or more")
    return ranks
