"""Operations that check: verify."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import cast

from shardstate.api.loading import raise_damage
from shardstate.api.planning import (
    asked_for,
    open_path,
    reads_of,
    sizes_of,
)
from shardstate.api.repairing import repaired
from shardstate.checkpoint import Checkpoint
from shardstate.engine import Counters, Progress, execute
from shardstate.errors import (
    UsageError,
)
from shardstate.findings import Execute, Verification
from shardstate.names import MANIFEST, record_rank
from shardstate.plan import Plan, plan_identity
from shardstate.report import Phases, Report
from shardstate.signing import checking_key
from shardstate.storage import Access, Storage, Writable, storage_at, writable_in_place
from shardstate.targets import CompareTarget, DigestTarget
from shardstate.trust import check_trust, checked_digest, own_digest
from shardstate.verify import block_problems, verify_set, verify_structure


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    against: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] | None = None,
    pattern: str | None = None,
    repair: bool | str | os.PathLike[str] = False,
    key: str | os.PathLike[str] | None = None,
    digest: str | None = None,
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a checkpoint and return all `problems`; none means that it is sound.

    Sizes, names, headers, JSON files and companions always; `full` hashes all data too; `against`
    implies `full` and compares every copy and fill with the source the set was made from. On
    vLLM's own sets and on ordinary checkpoints only the structure can be checked.

    `repair` implies `full` and makes the damaged files again, and only these: from the source that
    is recorded (True), or from the given source or other copy of the set; a manifest that is lost
    or damaged is made from the records of all ranks. `problems` are those that are left, and
    `notes` say what was made. Files that nothing lists are not removed.

    `key` is a file with the Ed25519 key that must have signed the set, public or private. `digest`
    is what its manifest's must be: of the file, or the one that it ends with. Both vouch for what
    this call reads: without `full` that is everything but the data.
    """
    phases = Phases()
    report = Report(bytes_wanted=0)
    access = asked_for(access, threads)
    public = checking_key(key) if key is not None else None
    expected = checked_digest(digest) if digest is not None else None
    figures: list[tuple[Counters, int]] = []  # of each pass, and what it read of the set beside

    def carry_out(
        plans: Sequence[Plan],
        storage: Storage,
        target: DigestTarget | CompareTarget,
        wanted: Sequence[frozenset[int]] | None,
    ) -> None:
        workers = threads or storage.traits.read_threads
        counters = execute(
            reads_of(plans, traits=storage.traits, threads=workers, wanted=wanted),
            storage=storage,
            target=target,
            threads=workers,
            progress=progress,
            fills_memory=False,
        )
        compared = target.bytes_read if isinstance(target, CompareTarget) else 0
        figures.append((counters, compared))

    opened = storage_at if repair is False else writable_in_place
    storage: Storage = opened(path, access)
    source = None
    try:
        with phases("open"):
            names = storage.entries()
            is_set = MANIFEST in names or any(record_rank(name) is not None for name in names)
            if repair is not False and not is_set:
                raise UsageError(
                    f"{storage.location}: is no set of shardstate, and nothing says what it should "
                    f"hold; leave --repair out, or fetch it again"
                )
            source = open_path(against, access=access) if against is not None else None
            if source is not None and source.catalog is None:
                raise UsageError(f"{against}: is no ordinary checkpoint to compare with")
        with phases("read"):
            if is_set:
                found = _set_checked(
                    storage,
                    repair,
                    report,
                    carry_out,
                    ranks=_checked_ranks(ranks),
                    full=full or source is not None,
                    source=source,
                    threads=threads or storage.traits.read_threads,
                    access=access,
                )
                report.kind = "shardstate"
                report.signed_by = check_trust(storage, found, key=public, digest=expected)
            else:
                if public is not None or expected is not None:
                    raise UsageError(
                        f"{storage.location}: is no set of shardstate, so that nothing is signed; "
                        f"leave --key and --digest out, or shard it and sign that"
                    )
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
    deep = full or source is not None or repair is not False
    _verified(report, found, is_set and deep)
    return phases.finish(report, main="read" if report.bytes_read else None)


def _set_checked(
    storage: Storage,
    repair: bool | str | os.PathLike[str],
    report: Report,
    carry_out: Execute,
    *,
    ranks: Sequence[int] | None,
    full: bool,
    source: Checkpoint | None,
    threads: int,
    access: Access | None,
) -> Verification:
    """Verify a set; where it is to be repaired, do that, and return what is wrong then."""

    def check(deep: bool) -> Verification:
        return verify_set(storage, ranks=ranks, full=deep or full, source=source, execute=carry_out)

    if repair is False:
        return check(full)
    return repaired(cast(Writable, storage), repair, report, check, threads=threads, access=access)


def check_data(checkpoint: Checkpoint, *, threads: int) -> None:
    """Hash all data of a set that is open; raise `DamageError` that lists what is damaged."""
    for rank in checkpoint.ranks:
        catalog = checkpoint.rank_catalog(rank)
        plan, target = plan_identity(catalog), DigestTarget([catalog])
        execute(
            reads_of([plan], threads=threads, traits=checkpoint.storage.traits),
            storage=checkpoint.storage,
            target=target,
            threads=threads,
            progress=None,
            fills_memory=False,
        )
        found = tuple(
            problem
            for entry in checkpoint.record(rank).files
            for problem in block_problems(
                entry, catalog, partial(target.blocks, 0), info=checkpoint.info
            )
        )
        raise_damage(Report(problems=found))


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
    report.notes = (*(report.notes or ()), *found.notes)
    report.materialised, report.materialised_bytes = found.opaque, found.opaque_bytes
    if (info := found.info) is not None:
        report.layout, report.stage, report.dtype = info.layout, info.stage, info.dtype
        report.topology = sizes_of(info.shape)
        report.committed = found.manifest is not None
    if found.manifest is not None:
        report.set = found.manifest.set
        report.digest = own_digest(found.manifest_bytes)


def _checked_ranks(ranks: Sequence[int] | None) -> Sequence[int] | None:
    if ranks is not None and (not ranks or min(ranks) < 0):
        raise UsageError(f"ranks {list(ranks)}: expected at least one rank, 0 or more")
    return ranks
