"""The repair that `verify` does where it is asked to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache

from shardstate.api.planners import Made, Planner, Request, planner_of
from shardstate.api.planning import open_path, reads_of
from shardstate.checkpoint import Checkpoint
from shardstate.engine import execute
from shardstate.errors import InputError, PathNotFound, UsageError
from shardstate.findings import Verification
from shardstate.manifest import SetInfo
from shardstate.plan import Plan
from shardstate.repair import Repair, apply, remake_manifest
from shardstate.report import Report
from shardstate.storage import Access, Storage, Writable, location_of
from shardstate.targets import DigestTarget, FilesTarget


def repaired(
    target: Writable,
    source: bool | str | os.PathLike[str],
    report: Report,
    check: Callable[[bool], Verification],
    *,
    threads: int,
    access: Access | None,
) -> Verification:
    """Repair a set in place and return what is wrong then; `report` gets notes and figures.

    `source` is True for the source that is recorded, else the source or another copy.
    """
    with target.lock():
        written, notes = remake_manifest(
            target,
            None
            if isinstance(source, bool)
            else lambda: _donor(target.location, source, None, access),
        )
        report.bytes_written, report.notes = written or None, notes
        found = check(True)
        info = found.info
        if not found.problems:
            return found
        donor = _donor(target.location, source, info, access)
        try:
            _check_donor(donor, info)
            repair = Repair(target, donor, _carry(threads), _replan(donor, info))
            found = apply(repair, found, check)
        finally:
            donor.close()
        target.sync()
    report.bytes_written = written + sum(repair.made.values())
    report.notes = (
        *notes,
        *(f"{name} was made again from {donor.location}" for name in sorted(repair.made)),
        *(
            f"{name} was not made again: {why}"
            for name, why in sorted(repair.failed.items())
            if name not in repair.made
        ),
    )
    return found


def _donor(
    location: str,
    source: bool | str | os.PathLike[str],
    info: SetInfo | None,
    access: Access | None,
) -> Checkpoint:
    """Open what files are made from."""
    if not isinstance(source, bool):
        if location_of(source) == location or os.path.realpath(source) == os.path.realpath(
            location
        ):
            raise UsageError(f"{location}: cannot be repaired from itself; name another copy")
        return open_path(source, access=access)
    if info is None:
        raise InputError(
            f"{location}: manifest and records are all damaged, and nothing says where the set "
            f"came from; name another copy (--repair COPY)"
        )
    if info.source is None:
        raise UsageError(
            f"{location}: no source is recorded, as for every saved module; name another copy "
            f"(--repair COPY)"
        )
    try:
        return open_path(info.source.location, access=access)
    except PathNotFound as error:
        raise PathNotFound(
            f"{info.source.location}: the recorded source of {location} is not there; name where "
            f"it is, or another copy of the set (--repair SRC)",
            file=info.source.location,
        ) from error


def _check_donor(donor: Checkpoint, info: SetInfo | None) -> None:
    """Raise `UsageError` for what is neither the source nor a copy."""
    if donor.kind == "vllm":
        raise UsageError(f"{donor.location}: was saved by vLLM and is no copy of this set")
    if donor.catalog is None or info is None or info.source is None:
        if donor.catalog is not None:
            raise UsageError(
                f"{donor.location}: is an ordinary checkpoint, and the set does not say what it "
                f"came from; name another copy of the set"
            )
        return
    if (found := donor.fingerprint()) != info.source.fingerprint:
        raise UsageError(
            f"{donor.location}: has fingerprint {found}, the set's source has "
            f"{info.source.fingerprint}: it is another model, or was changed"
        )


def _carry(
    threads: int,
) -> Callable[[Plan, Storage, FilesTarget | DigestTarget, frozenset[int] | None], None]:
    def carry(
        plan: Plan,
        storage: Storage,
        target: FilesTarget | DigestTarget,
        rows: frozenset[int] | None,
    ) -> None:
        execute(
            reads_of(
                [plan],
                threads=threads,
                in_dest_order=isinstance(target, FilesTarget),
                wanted=None if rows is None else [rows],
            ),
            storage=storage,
            target=target,
            threads=threads,
            progress=None,
            fills_memory=False,
        )

    return carry


def _replan(
    donor: Checkpoint, info: SetInfo | None
) -> Callable[[int], tuple[Plan, Sequence[tuple[str, ...]]]]:
    """Return what plans a rank anew, as `shard` without rules of one's own would."""

    @cache
    def planner() -> Planner:
        assert info is not None
        return planner_of(
            donor,
            info.layout,
            Request(
                tp=info.topology.tp,
                pp=info.topology.pp,
                dtype=info.dtype,
                pattern=info.pattern,
                engine_args=info.engine_arguments or None,
            ),
        )

    @cache
    def replanned(rank: int) -> Made:
        return planner().made(rank)

    return lambda rank: (replanned(rank).plan, replanned(rank).aliases)
