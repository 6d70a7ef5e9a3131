"""Operations that read: inspect, plan, load."""

from __future__ import annotations

import logging
import os
from collections import Counter

import numpy as np

from shardstate.api.planning import (
    READ_THREADS,
    RulesArgument,
    by_rule,
    describe_checkpoint,
    memory_reads,
    open_path,
    padding_bytes,
    rank_plan,
    sizes_of,
    write_counted,
    write_planned,
)
from shardstate.catalog import Catalog
from shardstate.checkpoint import Checkpoint
from shardstate.digest import BLOCK_BYTES
from shardstate.engine import Progress, execute
from shardstate.errors import (
    DamageError,
    UsageError,
)
from shardstate.plan import (
    Plan,
)
from shardstate.report import Phases, Problem, Report
from shardstate.targets import MemoryTarget

_log = logging.getLogger("shardstate")


def inspect(
    path: str | os.PathLike[str], *, tensors: bool = False, pattern: str | None = None
) -> Report:
    """Return what lies at `path`: kind, topology, sizes by dtype and rank, and its files.

    `tensors` adds `tensor_list`. Headers are read, weights are not.
    """
    phases = Phases()
    with open_path(path, pattern=pattern) as checkpoint, phases("open"):
        if checkpoint.catalog is not None:
            catalogs: dict[int | None, Catalog] = {None: checkpoint.catalog}
        else:
            catalogs = {rank: checkpoint.rank_catalog(rank) for rank in checkpoint.ranks}
        report = describe_checkpoint(checkpoint)
        by_dtype: Counter[str] = Counter()
        by_rank: Counter[str] = Counter()
        for rank, catalog in catalogs.items():
            for row, dtype in enumerate(catalog.dtypes):
                by_dtype[dtype] += catalog.nbytes(row)
                if rank is not None:
                    by_rank[str(rank)] += catalog.nbytes(row)
        report.bytes = sum(by_dtype.values())
        report.padding_bytes = sum(
            padding_bytes(checkpoint.record(rank).padding, catalog)
            for rank, catalog in catalogs.items()
            if rank is not None and checkpoint.kind == "shardstate"
        )
        report.bytes_by_dtype = dict(sorted(by_dtype.items()))
        report.bytes_by_rank = dict(by_rank) or None
        report.tensors = sum(len(catalog) for catalog in catalogs.values())
        report.file_list = tuple(
            {"name": name, "bytes": size, "rank": rank}
            for rank, catalog in catalogs.items()
            for name, size in zip(catalog.files, catalog.file_bytes, strict=True)
        )
        report.files = len(report.file_list)
        report.ranks = checkpoint.ranks or None
        if tensors:
            report.tensor_list = tuple(
                {
                    "name": t.name,
                    "dtype": t.dtype,
                    "shape": t.shape,
                    "file": t.file,
                    "begin": t.begin,
                    "end": t.end,
                }
                for catalog in catalogs.values()
                for t in catalog
            )
        report.bytes_meta = checkpoint.bytes_meta
    return phases.finish(report, main="open")


def plan(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    layout: str = "rules",
    rules: RulesArgument = None,
    dtype: str = "keep",
    pattern: str | None = None,
) -> Report:
    """Return what loading `rank` would read and make, without reading a weight."""
    phases = Phases()
    with open_path(path, pattern=pattern) as checkpoint:
        with phases("open"):
            report = describe_checkpoint(checkpoint)
        with phases("plan"):
            made = rank_plan(checkpoint, rank, tp, layout, rules, dtype)
            reads = memory_reads(made.plan)
            write_planned(report, [made.plan], reads, checkpoint)
            report.ranks = (rank,)
            report.topology = sizes_of(made.topology)
            report.by_rule = by_rule(made)
    return phases.finish(report, main="plan")


def load(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    layout: str = "rules",
    rules: RulesArgument = None,
    dtype: str = "keep",
    pattern: str | None = None,
    verify: bool = False,
) -> dict[str, np.ndarray]:
    """Return the tensors of one rank: {name: array}; ml_dtypes for bfloat16 and float8.

    Sub-byte types come packed, as flat arrays of uint8. From an ordinary checkpoint, `tp` says
    among how many ranks it is shared, and only what `rank` needs is read. `verify` compares
    digests while reading (sets of ours only) and raises `DamageError`.
    """
    return load_rank(
        path,
        rank=rank,
        tp=tp,
        layout=layout,
        rules=rules,
        dtype=dtype,
        pattern=pattern,
        verify=verify,
    )[0]


def load_rank(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    layout: str = "rules",
    rules: RulesArgument = None,
    dtype: str = "keep",
    pattern: str | None = None,
    verify: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], Report]:
    """Do what `load` does, and return the report as well."""
    phases = Phases()
    with open_path(path, pattern=pattern) as checkpoint:
        with phases("open"):
            report = describe_checkpoint(checkpoint)
            if verify and checkpoint.kind != "shardstate":
                raise UsageError(
                    f"{checkpoint.location}: no digests are recorded there, so nothing can be "
                    f"verified; leave verify out, or shard it"
                )
        with phases("plan"):
            made = rank_plan(checkpoint, rank, tp, layout, rules, dtype)
            reads = memory_reads(made.plan)
            write_planned(report, [made.plan], reads, checkpoint)
            report.ranks = (rank,)
            report.topology = sizes_of(made.topology)
        with phases("read"):
            target = MemoryTarget(made.plan.tensors, digests=verify)
            counters = execute(
                reads,
                storage=checkpoint.storage,
                target=target,
                threads=threads or READ_THREADS,
                progress=progress,
                fills_memory=True,
            )
            write_counted(report, counters)
            problems = _check_blocks(checkpoint, made.plan, target, rank) if verify else ()
        phases.finish(report, main="read")
    if verify:
        report.problems = problems
    if problems:
        first = problems[0]
        raise DamageError(
            f"{first.file}: {first.tensor}: {first.problem}"
            f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}",
            file=first.file,
            report=report,
        )
    if checkpoint.kind == "vllm":
        report.notes = (f"nothing vouches for the bytes of {checkpoint.location}",)
    mode = "recorded" if checkpoint.kind == "checkpoint" else "sharded"
    _log.info(
        "shardstate: rank=%d mode=%s layout=%s bytes=%d wanted=%d read=%d requests=%d "
        "seconds=%.3f gbps=%.2f verify=%s",
        rank,
        mode,
        report.layout,
        report.bytes,
        report.bytes_wanted,
        report.bytes_read,
        report.requests,
        report.seconds,
        report.gbps or 0.0,
        "yes" if verify else "no",
    )
    return target.arrays, report


def _check_blocks(
    checkpoint: Checkpoint, made: Plan, target: MemoryTarget, rank: int
) -> tuple[Problem, ...]:
    """Compare the digests of what was read with those of the rank's record."""
    problems = []
    for entry in checkpoint.record(rank).files:
        rows = [
            row
            for row in range(len(made.catalog))
            if made.catalog.files[made.catalog.file[row]] == entry.name
        ]
        for row, expected in zip(rows, entry.blocks, strict=True):
            tensor = made.catalog.tensor(row)
            for number, (want, have) in enumerate(zip(expected, target.blocks(row), strict=True)):
                if want != have:
                    begin = tensor.begin + number * BLOCK_BYTES
                    problems.append(
                        Problem(
                            entry.name,
                            tensor.name,
                            f"block {number} has digest {have}, expected {want}; copy "
                            f"{entry.name} again, or shard again with --force",
                            "digest",
                            begin,
                            min(begin + BLOCK_BYTES, tensor.end),
                        )
                    )
    return tuple(problems)
