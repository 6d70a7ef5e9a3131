"""Operations that read: inspect, plan, load."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from shardstate.api.planners import Made, Request, by_rule, rank_plan, resolved_layout
from shardstate.api.planning import (
    RulesArgument,
    asked_for,
    describe_checkpoint,
    extra_notes,
    open_path,
    padding_bytes,
    reads_of,
    sizes_of,
    write_counted,
    write_planned,
)
from shardstate.catalog import Catalog
from shardstate.checkpoint import Checkpoint
from shardstate.dtypes import DTYPES, numpy_dtype
from shardstate.engine import Progress, execute
from shardstate.errors import (
    DamageError,
    DigestError,
    OutOfMemory,
    UsageError,
)
from shardstate.garbage import without_collection
from shardstate.report import Phases, Problem, Report
from shardstate.signing import checking_key
from shardstate.storage import Access
from shardstate.targets import MemoryTarget, StoredDigests, allocate
from shardstate.trust import require_signature
from shardstate.verify import block_problems

_log = logging.getLogger("shardstate")


def inspect(
    path: str | os.PathLike[str],
    *,
    tensors: bool = False,
    pattern: str | None = None,
    access: Access | None = None,
) -> Report:
    """Return what lies at `path`: kind, topology, sizes by dtype and rank, and its files.

    `tensors` adds `tensor_list`. Headers are read, weights are not.
    """
    phases = Phases()
    with open_path(path, pattern=pattern, access=access) as checkpoint, phases("open"):
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
    return phases.finish(report, main=None)


def plan(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    pp: int = 1,
    layout: str = "auto",
    rules: RulesArgument = None,
    engine_args: Mapping[str, Any] | None = None,
    dtype: str = "keep",
    pattern: str | None = None,
    access: Access | None = None,
) -> Report:
    """Return what loading `rank` would read and make, without reading a weight.

    `layout`: "rules", "vllm", or "auto": vllm where vLLM is installed and knows the architecture.
    `pp` and `engine_args` (of vLLM's `EngineArgs`) need "vllm".
    """
    phases = Phases()
    request = Request(tp=tp or 1, pp=pp, rules=rules, dtype=dtype, engine_args=engine_args)
    with open_path(path, pattern=pattern, access=access) as checkpoint:
        with phases("open"):
            report = describe_checkpoint(checkpoint)
        layout = resolved_layout(checkpoint, layout, request, phases)
        with phases("plan"):
            made = rank_plan(checkpoint, rank, tp=tp, layout=layout, request=request)
            storage = checkpoint.storage
            threads = storage.traits.read_threads
            reads = reads_of([made.plan], traits=storage.traits, threads=threads, direct=True)
            write_planned(report, [made.plan], reads, checkpoint)
            _describe_made(report, made, rank, layout, checkpoint)
            report.by_rule = by_rule(made)
    return phases.finish(report, main=None)


def _describe_made(
    report: Report, made: Made, rank: int, layout: str, checkpoint: Checkpoint
) -> None:
    report.ranks, report.topology = (rank,), sizes_of(made.topology)
    report.materialised = made.materialised
    report.materialised_bytes = made.materialised_bytes
    if checkpoint.catalog is not None:
        report.layout = layout


def load(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    pp: int = 1,
    layout: str = "rules",
    rules: RulesArgument = None,
    engine_args: Mapping[str, Any] | None = None,
    dtype: str = "keep",
    pattern: str | None = None,
    verify: bool = False,
    key: str | os.PathLike[str] | None = None,
    map: bool = False,  # noqa: A002
    access: Access | None = None,
) -> dict[str, np.ndarray]:
    """Return the tensors of one rank: {name: array}; ml_dtypes for bfloat16 and float8.

    Sub-byte types come packed, as flat arrays of uint8. Alias names share one array. From an
    ordinary checkpoint, `tp` says among how many ranks it is shared, and only what `rank` needs is
    read. `verify` compares digests while reading (sets of ours only) and raises `DamageError`.
    `key`, a file with an Ed25519 key, does so too and wants the set signed by it
    (`SignatureError`).

    `map` reads nothing: arrays lie over a private mapping of the rank's files (of sets, on a local
    disk). Writing to them never reaches a file. Whoever truncates a mapped file kills the process
    that touches it (SIGBUS); the other modes raise an error there.
    """
    return load_rank(
        path,
        rank=rank,
        tp=tp,
        pp=pp,
        layout=layout,
        rules=rules,
        engine_args=engine_args,
        dtype=dtype,
        pattern=pattern,
        verify=verify,
        key=key,
        map=map,
        access=access,
    )[0]


def load_rank(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    pp: int = 1,
    layout: str = "rules",
    rules: RulesArgument = None,
    engine_args: Mapping[str, Any] | None = None,
    dtype: str = "keep",
    pattern: str | None = None,
    verify: bool = False,
    key: str | os.PathLike[str] | None = None,
    map: bool = False,  # noqa: A002
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], Report]:
    """Do what `load` does, and return the report as well."""
    request = Request(tp=tp or 1, pp=pp, rules=rules, dtype=dtype, engine_args=engine_args)
    public = checking_key(key) if key is not None else None
    verify = verify or public is not None
    with _damage_where(verify):
        phases = Phases()
        with open_path(path, pattern=pattern, access=asked_for(access, threads)) as checkpoint:
            workers = threads or checkpoint.storage.traits.read_threads
            with phases("open"):
                if public is not None:
                    require_signature(checkpoint, public)
                report = describe_checkpoint(checkpoint)
                if verify and checkpoint.kind != "shardstate":
                    raise UsageError(
                        f"{checkpoint.location}: no digests are recorded there, so nothing can be "
                        f"verified; leave verify out, or shard it"
                    )
                if map and (checkpoint.catalog is not None or verify):
                    raise UsageError(
                        f"{checkpoint.location}: map takes the files of a set as they are and "
                        f"reads nothing; leave verify out, and shard an ordinary checkpoint first"
                    )
            layout = resolved_layout(checkpoint, layout, request, phases)
            with phases("plan"), without_collection():
                made = rank_plan(checkpoint, rank, tp=tp, layout=layout, request=request)
                reads = (
                    []
                    if map
                    else reads_of(
                        [made.plan],
                        traits=checkpoint.storage.traits,
                        threads=workers,
                        direct=True,
                        hashed=verify,
                    )
                )
                write_planned(report, [made.plan], reads, checkpoint)
                _describe_made(report, made, rank, layout, checkpoint)
                notes = extra_notes(checkpoint, rank)
                if checkpoint.kind == "vllm":
                    notes.append(f"nothing vouches for the bytes of {checkpoint.location}")
            with phases("read"):
                catalog = made.plan.catalog
                with _memory_for(checkpoint, rank, report):
                    arrays = _mapped(checkpoint, catalog) if map else allocate(made.plan.tensors)
                digests = stored_digests(made.plan.catalog) if verify else None
                target = MemoryTarget(
                    [array.reshape(-1).view(np.uint8) for array in arrays.values()], digests=digests
                )
                with _memory_for(checkpoint, rank, report):
                    counters = execute(
                        reads,
                        storage=checkpoint.storage,
                        target=target,
                        threads=workers,
                        progress=progress,
                        fills_memory=True,
                    )
                checkpoint.check_unchanged(catalog.files)
                write_counted(report, counters)
                problems = check_blocks(checkpoint, digests, rank) if digests is not None else ()
                report.hashing = digests.seconds if digests is not None else None
                stored = checkpoint.kind == "shardstate"
                for group in checkpoint.record(rank).aliases if stored else made.aliases:
                    arrays |= {name: arrays[group[0]] for name in group if group[0] in arrays}
            phases.finish(report, main=None if map else "read")
        if verify:
            report.problems = problems
            raise_damage(report)
        report.notes = tuple(notes) or None
        log_loaded(report, rank=rank, verify=verify, way=f"layout={report.layout}")
        return arrays, report


@contextmanager
def _memory_for(checkpoint: Checkpoint, rank: int, report: Report) -> Iterator[None]:
    """Say of a MemoryError what did not fit."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(
            f"{checkpoint.location}: rank {rank} takes {report.bytes} bytes, and memory ran out; "
            f"free some, or share it among more ranks"
        ) from error


@contextmanager
def _damage_where(verify: bool) -> Iterator[None]:
    """Let a wrong digest of a header, record or manifest count as damage where one verifies."""
    try:
        yield
    except DigestError as error:
        if not verify:
            raise
        name = error.file or ""
        problem = Problem(os.path.basename(name), error.tensor, str(error), "digest")
        raise DamageError(str(error), file=name, report=Report(problems=(problem,))) from None


def _mapped(checkpoint: Checkpoint, catalog: Catalog) -> dict[str, np.ndarray]:
    """Return arrays over private mappings of the files of `catalog`."""
    files = [checkpoint.storage.map(name) for name in catalog.files]
    arrays: dict[str, np.ndarray] = {}
    for row, tensor in enumerate(catalog):
        raw = files[catalog.file[row]][tensor.begin : tensor.end]
        dtype = DTYPES[tensor.dtype]
        arrays[tensor.name] = raw if dtype.packed else raw.view(numpy_dtype(tensor.dtype))
        if not dtype.packed:
            arrays[tensor.name] = arrays[tensor.name].reshape(tensor.shape)
    return arrays


def stored_digests(catalog: Catalog) -> StoredDigests:
    """Return what hashes the tensors of a rank while a plan reads all of them."""
    return StoredDigests([catalog.nbytes(row) for row in range(len(catalog))])


def check_blocks(checkpoint: Checkpoint, digests: StoredDigests, rank: int) -> tuple[Problem, ...]:
    """Compare the digests of what was read, whole, with those of the rank's record."""
    catalog = checkpoint.rank_catalog(rank)
    return tuple(
        problem
        for entry in checkpoint.record(rank).files
        for problem in block_problems(entry, catalog, digests.blocks, info=checkpoint.info)
    )


def raise_damage(report: Report) -> None:
    """Raise `DamageError` if `report` has problems."""
    if not report.problems:
        return
    first, more = report.problems[0], len(report.problems) - 1
    raise DamageError(
        f"{first.file}: {first.tensor}: {first.problem}{f' (and {more} more)' if more else ''}",
        file=first.file,
        report=report,
    )


def _cost(report: Report) -> str:
    """Return what comparing digests took, for the log line: thread seconds, within `read`."""
    return "" if report.hashing is None else f" hashing={report.hashing:.3f}"


def log_loaded(
    report: Report, *, rank: int, verify: bool, way: str, mode: str | None = None
) -> None:
    """Log the one line that says how a rank was loaded; `way` is key=value pairs of the caller."""
    _log.info(
        "shardstate: rank=%d mode=%s %s bytes=%d wanted=%d read=%d requests=%d "
        "seconds=%.3f phases=%s gbps=%.2f materialised=%d verify=%s",
        rank,
        mode or ("recorded" if report.kind == "checkpoint" else "sharded"),
        way,
        report.bytes,
        report.bytes_wanted,
        report.bytes_read,
        report.requests,
        report.seconds,
        ",".join(f"{name}:{seconds:.3f}" for name, seconds in (report.phases or {}).items()),
        report.gbps or 0.0,
        report.materialised or 0,
        "no" if not verify else "yes" + _cost(report),
    )
