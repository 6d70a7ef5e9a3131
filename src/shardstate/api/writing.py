"""Operations that write: shard."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec

from shardstate.api.planners import Made, Request, by_rule, planner_of, resolved_layout
from shardstate.api.planning import (
    RulesArgument,
    asked_for,
    describe_checkpoint,
    nbytes_of,
    open_path,
    reads_of,
    sizes_of,
    write_counted,
    write_planned,
)
from shardstate.coalesce import Read
from shardstate.commit import SetWriter, companions_of
from shardstate.engine import Progress, execute
from shardstate.errors import (
    ChangedFile,
    InputError,
    TargetError,
    UsageError,
)
from shardstate.inventory import Identity
from shardstate.manifest import PartEntry, SetInfo, Source, set_id
from shardstate.names import check_pattern
from shardstate.parts import PartFile, plan_parts
from shardstate.plan import (
    padding_boxes,
)
from shardstate.report import Phases, Report
from shardstate.sharding import (
    Topology,
)
from shardstate.storage import (
    Access,
    LocalStorage,
    Storage,
    Writable,
    is_address,
    location_of,
    revision_of,
    writable_at,
)
from shardstate.targets import FilesTarget

_log = logging.getLogger("shardstate")

LOCAL_WRITE_THREADS = LocalStorage.traits.write_threads
MAX_PART_SIZE = "5GB"


def shard(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tp: int,
    pp: int = 1,
    ranks: Sequence[int] | None = None,
    layout: str = "auto",
    rules: RulesArgument = None,
    engine_args: Mapping[str, Any] | None = None,
    dtype: str = "keep",
    pattern: str | None = None,
    max_part_size: int | str = MAX_PART_SIZE,
    force: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the rank files of an ordinary checkpoint for `tp` × `pp` ranks, in one pass over it.

    Each source byte is read once. An interrupted run of the same set goes on after its last
    complete parts; what is complete already is left alone. `ranks` writes some ranks only; the
    last of them commits the set. `force` replaces another set. `dry_run` returns the planned
    figures and writes nothing.

    `layout`: "rules", "vllm", or "auto": vllm where vLLM is installed and knows the architecture.
    `pp` and `engine_args` (of vLLM's `EngineArgs`) need "vllm"; there `dtype` is the engine's.
    """
    phases = Phases()
    max_part_bytes = parse_size(max_part_size)
    request = Request(
        tp=tp, pp=pp, rules=rules, dtype=dtype, pattern=pattern, engine_args=engine_args
    )
    Topology(tp, pp)  # refuses what cannot be
    with open_path(path, access=asked_for(access, threads)) as checkpoint:
        threads = threads or max(LOCAL_WRITE_THREADS, checkpoint.storage.traits.read_threads)
        with phases("open"):
            if checkpoint.catalog is None:
                raise InputError(
                    f"{checkpoint.location}: is sharded already, for tp "
                    f"{checkpoint.topology and checkpoint.topology.tp}; shard from its source"
                )
            refuse_nested(checkpoint.location, out)
            files = checkpoint.catalog.files
            identity = _identity(checkpoint.storage, files)
        layout = resolved_layout(checkpoint, layout, request, phases)
        with phases("plan"):
            planner = planner_of(checkpoint, layout, request)
            source = Source(
                checkpoint.location, revision_of(checkpoint.storage), checkpoint.fingerprint()
            )
            info = msgspec.structs.replace(planner.info, source=source)
            identifier = set_id(
                info=info,
                fingerprint=source.fingerprint,
                max_part_bytes=max_part_bytes,
                rules_digest=planner.rules_digest,
            )
            template = check_pattern(info.pattern, planner.topology)
            chosen = chosen_ranks(ranks, planner.topology)
            made = {rank: planner.made(rank) for rank in chosen}
            parts = {
                rank: plan_parts(
                    each.plan.tensors,
                    rank=rank,
                    set_id=identifier,
                    pattern=template,
                    max_part_bytes=max_part_bytes,
                )
                for rank, each in made.items()
            }
            plans = [each.plan for each in made.values()]
            reads = reads_of(
                plans,
                traits=checkpoint.storage.traits,
                threads=threads,
                in_dest_order=True,
            )
            report = describe_checkpoint(checkpoint)
            write_planned(report, plans, reads, checkpoint)
            _describe_set(report, info, identifier, made, parts)
        if not dry_run:
            with (
                phases("write"),
                closing(writable_at(out, access or Access(), outputs=len(chosen))) as target,
                target.lock(),
            ):
                writer = SetWriter(
                    target,
                    set_id=identifier,
                    info=info,
                    companions=[
                        (checkpoint.storage, name) for name in companions_of(checkpoint.storage)
                    ],
                    source_identity=identity,
                )
                _write(
                    writer,
                    source=checkpoint.storage,
                    files=files,
                    identity=identity,
                    target=target,
                    made=made,
                    parts=parts,
                    reads=reads,
                    report=report,
                    force=force,
                    threads=threads,
                    progress=progress,
                )
    return phases.finish(report, main="write")


def chosen_ranks(ranks: Sequence[int] | None, topology: Topology) -> tuple[int, ...]:
    """Return the ranks that are to be written; None are all."""
    chosen = tuple(range(topology.world)) if ranks is None else tuple(sorted(set(ranks)))
    if not chosen:
        raise UsageError("no rank is chosen")
    if beyond := [rank for rank in chosen if not 0 <= rank < topology.world]:
        raise UsageError(f"rank {beyond[0]} is out of range; expected 0 to {topology.world - 1}")
    return chosen


def _describe_set(
    report: Report,
    info: SetInfo,
    identifier: str,
    made: Mapping[int, Made],
    parts: Mapping[int, Sequence[PartFile]],
) -> None:
    """Write into `report` what the set will be."""
    report.kind = "shardstate"
    report.layout, report.stage, report.dtype = info.layout, info.stage, info.dtype
    report.set, report.topology, report.ranks = identifier, sizes_of(info.shape), tuple(made)
    report.committed = False
    report.bytes_by_rank = {str(rank): nbytes_of(each.plan.tensors) for rank, each in made.items()}
    report.materialised = sum(each.materialised for each in made.values())
    report.materialised_bytes = sum(each.materialised_bytes for each in made.values())
    report.by_rule = by_rule(next(iter(made.values())))
    report.file_list = tuple(
        {"name": part.name, "bytes": part.nbytes, "rank": rank}
        for rank, each in parts.items()
        for part in each
    )
    report.files = len(report.file_list)


def refuse_nested(source: str, out: str | os.PathLike[str]) -> None:
    """Refuse a target that is the source, inside it or around it; or that is no directory."""
    if is_address(source) != is_address(out):
        return
    local = not is_address(out)
    here, there = source, location_of(out)
    if local:
        here, there = os.path.realpath(source), os.path.realpath(out)
    elif here.split("/")[:3] != there.split("/")[:3]:
        return  # two buckets
    if here == there or os.path.commonpath([here, there]) in (here, there):
        relation = (
            "is" if here == there else "lies inside" if there.startswith(here) else "contains"
        )
        raise TargetError(f"{there}: {relation} the source {source}; choose a directory beside it")
    if local and os.path.lexists(out) and not os.path.isdir(out):
        raise TargetError(f"{out}: is no directory; choose another place")


def _identity(storage: Storage, files: Sequence[str]) -> Identity:
    """Return what changes when one of `files` does."""
    entries = storage.entries()
    return tuple((name, *entries[name].identity) for name in files if name in entries)


def _write(
    writer: SetWriter,
    *,
    source: Storage,
    files: Sequence[str],
    identity: Identity,
    target: Writable,
    made: Mapping[int, Made],
    parts: Mapping[int, Sequence[PartFile]],
    reads: Sequence[Read],
    report: Report,
    force: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    """Write what is not there yet, commit each rank, and the set if it is complete."""
    kept = writer.begin(parts, force=force)
    if kept is None:
        report.notes = (f"{target.location} holds this set already; nothing was written",)
        report.bytes_read, report.requests, report.committed = 0, 0, True
        report.peak_extra_bytes = report.bytes_written = 0
        return
    ranks = sorted(kept)
    if any(kept.values()):
        count = sum(len(each) for each in kept.values())
        report.notes = (f"{count} parts of an interrupted run were complete and are kept",)
    entries: dict[int, dict[int, PartEntry]] = {rank: dict(kept[rank]) for rank in ranks}

    def finished(part: PartFile, entry: PartEntry) -> None:
        writer.note(part, entry)
        entries[part.rank][part.part] = entry

    rest = [[part for part in parts[rank] if part.part not in kept[rank]] for rank in ranks]
    wanted = [frozenset(row for part in each for row in part.rows) for each in rest]
    if len(kept) < len(made) or any(kept.values()):
        reads = reads_of(
            [made[rank].plan for rank in ranks],
            traits=source.traits,
            threads=threads,
            in_dest_order=True,
            wanted=wanted,
        )
    with FilesTarget(target, rest, finished) as outputs:
        counters = execute(
            reads,
            storage=source,
            target=outputs,
            threads=threads,
            progress=progress,
            fills_memory=False,
        )
    write_counted(report, counters)
    report.bytes_written = sum(part.nbytes - len(part.header) for each in rest for part in each)
    if changed := sorted(set(_identity(source, files)) ^ set(identity)):
        name = changed[0][0]
        raise ChangedFile(
            f"{source.location}/{name}: changed while it was read; run it again", file=str(name)
        )
    for rank in ranks:
        plan = made[rank].plan
        writer.finish_rank(
            rank,
            [entries[rank][part.part] for part in parts[rank]],
            padding=padding_boxes(plan.fills, plan.tensors),
            provenance=plan,
            aliases=made[rank].aliases,
        )
    lacking = writer.commit()
    report.committed = not lacking
    if lacking:
        _log.warning(
            "shardstate: %s is not committed yet: ranks %s are missing",
            target.location,
            ", ".join(map(str, lacking)),
        )


def parse_size(size: int | str) -> int:
    """Return bytes: an int, or a number with kB, MB, GB, TB (powers of 1000) or KiB … (1024)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", str(size))
    if found:
        power = " KMGT".index(found[2].upper() or " ")
        value = float(found[1]) * (1024 if found[3] else 1000) ** power
        if value >= 1 and value == int(value) and not (found[3] and not found[2]):
            return int(value)
    raise UsageError(f'size {size!r}: expected bytes, or a text such as "5GB" or "5GiB"')
