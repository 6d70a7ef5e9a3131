"""Each operation: open, plan, execute. Owns every default; the command line only calls this."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shardstate.catalog import Catalog, Tensors
from shardstate.checkpoint import Checkpoint, open_checkpoint
from shardstate.coalesce import Read, plan_reads
from shardstate.commit import SetWriter, companions_of
from shardstate.digest import BLOCK_BYTES, digest_of
from shardstate.dtypes import CAST_NAMES
from shardstate.engine import Counters, Progress, execute
from shardstate.errors import (
    DamageError,
    InputError,
    PathNotFound,
    RulesError,
    SetError,
    TargetError,
    UsageError,
)
from shardstate.manifest import PartEntry, SetInfo, Sizes, Source, set_id
from shardstate.names import CONFIG, DEFAULT_PATTERN, MANIFEST, check_pattern, record_rank
from shardstate.parts import PartFile, plan_parts
from shardstate.plan import (
    Plan,
    bytes_wanted,
    check_plan,
    padding_boxes,
    plan_identity,
    plan_shares,
)
from shardstate.provenance import provenance_json
from shardstate.report import Phases, Problem, Report
from shardstate.sharding import (
    TABLES,
    Kind,
    Rank,
    Rule,
    Topology,
    check_shares,
    describe,
    match_rules,
    parse_rules,
    rules_json,
)
from shardstate.storage import LocalStorage, Storage
from shardstate.targets import CompareTarget, DigestTarget, FilesTarget, MemoryTarget
from shardstate.verify import Verification, verify_set, verify_structure

_log = logging.getLogger("shardstate")

# Two threads reach what a disk gives through the page cache; writing adds hashing and fsync.
READ_THREADS = 2
WRITE_THREADS = 4
PIECE_BYTES = BLOCK_BYTES  # so that pieces of contiguous tensors are whole digest blocks
READ_BYTES = 2 * PIECE_BYTES
MAX_GAP_BYTES = 256 << 10  # a local disk reads over this as fast as it begins another request
MAX_PART_SIZE = "5GB"
_MAX_RULES_BYTES = 16 << 20

RulesArgument = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None


def open(path: str | os.PathLike[str], *, pattern: str | None = None) -> Checkpoint:  # noqa: A001
    """Open what lies at `path`: an ordinary checkpoint, a set of ours, or one that vLLM wrote.

    Reads headers and small JSON files only. `pattern` names the rank files of vLLM's own sets.
    """
    return open_checkpoint(_storage(path), pattern=pattern)


def inspect(
    path: str | os.PathLike[str], *, tensors: bool = False, pattern: str | None = None
) -> Report:
    """Return what lies at `path`: kind, topology, sizes by dtype and rank, and its files.

    `tensors` adds `tensor_list`. Headers are read, weights are not.
    """
    phases = Phases()
    with open(path, pattern=pattern) as checkpoint, phases("open"):
        if checkpoint.catalog is not None:
            catalogs: dict[int | None, Catalog] = {None: checkpoint.catalog}
        else:
            catalogs = {rank: checkpoint.rank_catalog(rank) for rank in checkpoint.ranks}
        report = _describe(checkpoint)
        by_dtype: Counter[str] = Counter()
        by_rank: Counter[str] = Counter()
        for rank, catalog in catalogs.items():
            for row, dtype in enumerate(catalog.dtypes):
                by_dtype[dtype] += catalog.nbytes(row)
                if rank is not None:
                    by_rank[str(rank)] += catalog.nbytes(row)
        report.bytes = sum(by_dtype.values())
        report.padding_bytes = sum(
            _padding_bytes(checkpoint.record(rank).padding, catalog)
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
    with open(path, pattern=pattern) as checkpoint:
        with phases("open"):
            report = _describe(checkpoint)
        with phases("plan"):
            made = _rank_plan(checkpoint, rank, tp, layout, rules, dtype)
            reads = _memory_reads(made.plan)
            _planned(report, [made.plan], reads, checkpoint)
            report.ranks = (rank,)
            report.topology = _sizes(made.topology)
            report.by_rule = _by_rule(made)
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
    with open(path, pattern=pattern) as checkpoint:
        with phases("open"):
            report = _describe(checkpoint)
            if verify and checkpoint.kind != "shardstate":
                raise UsageError(
                    f"{checkpoint.location}: no digests are recorded there, so nothing can be "
                    f"verified; leave verify out, or shard it"
                )
        with phases("plan"):
            made = _rank_plan(checkpoint, rank, tp, layout, rules, dtype)
            reads = _memory_reads(made.plan)
            _planned(report, [made.plan], reads, checkpoint)
            report.ranks = (rank,)
            report.topology = _sizes(made.topology)
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
            _counted(report, counters)
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


def shard(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tp: int,
    ranks: Sequence[int] | None = None,
    layout: str = "rules",
    rules: RulesArgument = None,
    dtype: str = "keep",
    pattern: str | None = None,
    max_part_size: int | str = MAX_PART_SIZE,
    force: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the rank files of an ordinary checkpoint for `tp` ranks, in one pass over it.

    Each source byte is read once. An interrupted run of the same set goes on after its last
    complete parts; what is complete already is left alone. `ranks` writes some ranks only; the
    last of them commits the set. `force` replaces another set. `dry_run` returns the planned
    figures and writes nothing.
    """
    phases = Phases()
    template = check_pattern(pattern or DEFAULT_PATTERN, tp=tp)
    max_part_bytes = parse_size(max_part_size)
    chosen = tuple(range(tp)) if ranks is None else tuple(sorted(set(ranks)))
    for rank in chosen:
        Rank(rank, tp)
    if not chosen:
        raise UsageError("no rank is chosen")
    with open(path) as checkpoint:
        with phases("open"):
            if checkpoint.catalog is None:
                raise InputError(
                    f"{checkpoint.location}: is sharded already, for tp "
                    f"{checkpoint.topology and checkpoint.topology.tp}; shard from its source"
                )
            _refuse_nested(checkpoint.location, os.fspath(out))
        with phases("plan"):
            resolved, where = _rules_of(checkpoint, rules, layout)
            matched, kinds = _kinds(checkpoint, resolved, where, tp)
            plans = [
                _checked(plan_shares(checkpoint.catalog, kinds, rank=Rank(rank, tp), dtype=dtype))
                for rank in chosen
            ]
            info = SetInfo(
                topology=Sizes(tp),
                layout="rules",
                stage="checkpoint",
                pattern=template.text,
                dtype=_dtype(dtype),
                source=Source(checkpoint.location, None, checkpoint.fingerprint()),
            )
            assert info.source is not None
            identifier = set_id(
                info=info,
                fingerprint=info.source.fingerprint,
                max_part_bytes=max_part_bytes,
                rules_digest=digest_of(rules_json(matched)),
            )
            parts = {
                rank: plan_parts(
                    made.tensors,
                    rank=rank,
                    set_id=identifier,
                    pattern=template,
                    max_part_bytes=max_part_bytes,
                )
                for rank, made in zip(chosen, plans, strict=True)
            }
            report = _describe(checkpoint)
            report.kind, report.set, report.layout = "shardstate", identifier, "rules"
            report.topology, report.ranks = _sizes(Topology(tp)), chosen
            reads = _file_reads(plans, None)
            _planned(report, plans, reads, checkpoint)
            report.by_rule = _by_rule(_Made(plans[0], Topology(tp), kinds))
            report.bytes_by_rank = {
                str(rank): sum(made.tensors.nbytes(row) for row in range(len(made.tensors)))
                for rank, made in zip(chosen, plans, strict=True)
            }
            report.file_list = tuple(
                {"name": part.name, "bytes": part.nbytes, "rank": rank}
                for rank, each in parts.items()
                for part in each
            )
            report.files = len(report.file_list)
            if dry_run:
                report.committed = False
            else:
                provenance = {
                    rank: provenance_json(made, set_id=identifier, rank=rank)
                    for rank, made in zip(chosen, plans, strict=True)
                }
        if not dry_run:
            with phases("write"):
                with LocalStorage(out, create=True) as target, target.lock():
                    writer = SetWriter(
                        target,
                        set_id=identifier,
                        info=info,
                        companions=[
                            (checkpoint.storage, name) for name in companions_of(checkpoint.storage)
                        ],
                        source_identity=_identity(checkpoint),
                    )
                    _write(
                        checkpoint,
                        target,
                        writer,
                        dict(zip(chosen, plans, strict=True)),
                        parts,
                        provenance,
                        reads,
                        report,
                        force=force,
                        threads=threads or WRITE_THREADS,
                        progress=progress,
                    )
    return phases.finish(report, main="plan" if dry_run else "write")


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    against: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] | None = None,
    pattern: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a checkpoint and return all `problems`; none means that it is sound.

    Sizes, names, headers, JSON files and companions always; `full` hashes all data too; `against`
    implies `full` and compares every copy and fill with the source the set was made from. On
    vLLM's own sets and on ordinary checkpoints only the structure can be checked.
    """
    phases = Phases()
    report = Report(bytes_wanted=0, bytes_read=0, requests=0, peak_extra_bytes=0)

    def carry_out(
        plans: Sequence[Plan],
        storage: Storage,
        target: DigestTarget | CompareTarget,
        wanted: Sequence[frozenset[int]] | None,
    ) -> None:
        reads = plan_reads(
            plans,
            in_dest_order=False,
            piece_bytes=PIECE_BYTES,
            read_bytes=READ_BYTES,
            max_gap_bytes=MAX_GAP_BYTES,
            wanted=wanted,
        )
        _counted(
            report,
            execute(
                reads,
                storage=storage,
                target=target,
                threads=threads or READ_THREADS,
                progress=progress,
                fills_memory=False,
            ),
        )
        if isinstance(target, CompareTarget):
            report.bytes_read = (report.bytes_read or 0) + target.bytes_read

    storage = _storage(path)
    try:
        with phases("open"):
            names = storage.entries()
            is_set = MANIFEST in names or any(record_rank(name) is not None for name in names)
            source = open(against) if against is not None else None
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
                if full or source is not None:
                    raise UsageError(
                        f"{storage.location}: no digests or provenance are recorded there; "
                        f"leave --full and --against out"
                    )
                report.kind, found = verify_structure(storage, pattern=pattern, ranks=ranks)
    finally:
        storage.close()
        if against is not None and source is not None:
            source.close()
    _verified(report, found, full or source is not None)
    return phases.finish(report, main="read")


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


@dataclass(frozen=True)
class _Made:
    """A rank's plan and how it came about."""

    plan: Plan
    topology: Topology
    kinds: Sequence[Kind] | None  # per row of the catalog, where rules made it


def _storage(path: str | os.PathLike[str]) -> LocalStorage:
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]*://", text):
        raise UsageError(f"{text}: only local directories can be read; copy it to a disk first")
    if not os.path.lexists(text):
        raise PathNotFound(f"{text}: there is no such directory; check the path", file=text)
    if not os.path.isdir(text):
        raise InputError(
            f"{text}: is no directory; give the directory that holds the checkpoint", file=text
        )
    return LocalStorage(text)


def _describe(checkpoint: Checkpoint) -> Report:
    info = checkpoint.info
    return Report(
        kind=checkpoint.kind,
        layout=info.layout if info else "vllm" if checkpoint.kind == "vllm" else None,
        stage=checkpoint.stage,
        topology=_sizes(checkpoint.topology),
        set=checkpoint.set_id,
        committed=checkpoint.committed,
        materialised=0,
        materialised_bytes=0,
    )


def _sizes(topology: Topology | None) -> dict[str, int] | None:
    if topology is None:
        return None
    return {"tp": topology.tp, "pp": topology.pp, "dp": topology.dp}


def _dtype(dtype: str) -> str:
    if dtype not in CAST_NAMES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(CAST_NAMES)}")
    return dtype


def _rules_of(
    checkpoint: Checkpoint, rules: RulesArgument, layout: str
) -> tuple[tuple[Rule, ...], str]:
    """Return the resolved rules and where they come from."""
    if layout != "rules":
        raise UsageError(f"layout {layout!r}: expected 'rules'")
    config = checkpoint.config()
    if isinstance(rules, str | os.PathLike):
        file = Path(rules)
        try:
            if file.stat().st_size > _MAX_RULES_BYTES:
                raise RulesError(f"{file}: is too large for a rules file", file=str(file))
            data = file.read_bytes()
        except OSError as error:
            raise PathNotFound(
                f"{file}: cannot read the rules: {error.strerror}; check the path", file=str(file)
            ) from error
        return parse_rules(data, config=config, where=str(file)), str(file)
    if rules is not None:
        where = "the rules given"
        return parse_rules(msgspec.json.encode(rules), config=config, where=where), where
    ways = "give split rules (--rules FILE, or rules=[…])"
    if config is None:
        raise RulesError(
            f"{checkpoint.location}: there is no {CONFIG} that names the model type; {ways}",
            file=CONFIG,
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TABLES:
        raise RulesError(
            f"{checkpoint.location}: there is no built-in table for model type {model_type!r} "
            f"(known: {', '.join(TABLES)}); {ways}",
            file=CONFIG,
        )
    table = resources.files("shardstate").joinpath(f"tables/{TABLES[model_type]}.json")
    where = f"the table for {model_type}"
    return parse_rules(table.read_bytes(), config=config, where=where), where


def _kinds(
    checkpoint: Checkpoint, rules: tuple[Rule, ...], where: str, tp: int
) -> tuple[list[Rule], list[Kind]]:
    """Return the rules that match anything, in their order, and the kind of each tensor."""
    catalog = checkpoint.catalog
    assert catalog is not None
    matched = match_rules(catalog.names, rules, where=where)
    kinds = [rule.kind for rule in matched]
    check_shares(catalog.names, catalog.shapes, kinds, world=tp)
    used = set(matched)
    return [rule for rule in rules if rule in used], kinds


def _rank_plan(
    checkpoint: Checkpoint,
    rank: int,
    tp: int | None,
    layout: str,
    rules: RulesArgument,
    dtype: str,
) -> _Made:
    """Return the plan that makes `rank`, after checking the flags against what is there."""
    _dtype(dtype)
    if checkpoint.catalog is not None:
        if tp is None:
            raise UsageError(
                f"{checkpoint.location}: is an ordinary checkpoint; say among how many ranks it is "
                f"shared (--tp N, or tp=N)"
            )
        place = Rank(rank, tp)
        resolved, where = _rules_of(checkpoint, rules, layout)
        _, kinds = _kinds(checkpoint, resolved, where, tp)
        made = plan_shares(checkpoint.catalog, kinds, rank=place, dtype=dtype)
        return _Made(_checked(made), Topology(tp), kinds)
    topology = checkpoint.topology
    assert topology is not None
    info = checkpoint.info
    if tp is not None and tp != topology.tp:
        raise UsageError(
            f"{checkpoint.location}: is a set for tp {topology.tp}, and tp {tp} was asked for; "
            f"leave --tp out, or shard the source for {tp} ranks"
        )
    if rules is not None:
        raise UsageError(f"{checkpoint.location}: is sharded already; leave the rules out")
    if dtype not in ("keep", info.dtype if info else "keep"):
        raise UsageError(
            f"{checkpoint.location}: is a set with dtype {info.dtype if info else 'keep'}, and "
            f"{dtype} was asked for; leave --dtype out, or shard the source with it"
        )
    if not 0 <= rank < topology.world:
        raise UsageError(
            f"{checkpoint.location}: rank {rank} is out of range; the set has ranks 0 to "
            f"{topology.world - 1}"
        )
    if rank not in checkpoint.ranks:
        raise SetError(
            f"{checkpoint.location}: has no record of rank {rank}; finish the set with "
            f"shard --ranks {rank}"
        )
    return _Made(plan_identity(checkpoint.rank_catalog(rank)), topology, None)


def _checked(made: Plan) -> Plan:
    check_plan(made)
    return made


def _checked_ranks(ranks: Sequence[int] | None) -> Sequence[int] | None:
    if ranks is not None and (not ranks or min(ranks) < 0):
        raise UsageError(f"ranks {list(ranks)}: expected at least one rank, 0 or more")
    return ranks


def _memory_reads(made: Plan) -> list[Read]:
    return plan_reads(
        [made],
        in_dest_order=False,
        piece_bytes=PIECE_BYTES,
        read_bytes=READ_BYTES,
        max_gap_bytes=MAX_GAP_BYTES,
    )


def _file_reads(plans: Sequence[Plan], wanted: Sequence[frozenset[int]] | None) -> list[Read]:
    return plan_reads(
        plans,
        in_dest_order=True,
        piece_bytes=PIECE_BYTES,
        read_bytes=READ_BYTES,
        max_gap_bytes=MAX_GAP_BYTES,
        wanted=wanted,
    )


def _planned(
    report: Report, plans: Sequence[Plan], reads: Sequence[Read], checkpoint: Checkpoint
) -> None:
    """Write the planned figures into `report`."""
    report.bytes = sum(_nbytes(each.tensors) for each in plans)
    report.padding_bytes = sum(
        _padding_bytes(padding_boxes(each.fills, each.tensors), each.tensors) for each in plans
    )
    report.bytes_wanted = bytes_wanted(plans)
    report.bytes_read = sum(read.nbytes for read in reads if read.file is not None)
    report.bytes_meta = checkpoint.bytes_meta
    report.requests = sum(read.file is not None for read in reads)
    report.tensors = sum(len(each.tensors) for each in plans)
    report.files = len({read.file for read in reads if read.file is not None})
    by_dtype: Counter[str] = Counter()
    for each in plans:
        for row, dtype in enumerate(each.tensors.dtypes):
            by_dtype[dtype] += each.tensors.nbytes(row)
    report.bytes_by_dtype = dict(sorted(by_dtype.items()))


def _nbytes(tensors: Tensors) -> int:
    return sum(tensors.nbytes(row) for row in range(len(tensors)))


def _padding_bytes(padding: Mapping[str, Sequence[Any]], tensors: Tensors) -> int:
    total = 0
    for name, boxes in padding.items():
        row = tensors.row[name]
        whole = int(np.prod(tensors.shapes[row]))
        for box in boxes:
            elements = int(np.prod([end - begin for begin, end in box]))
            total += tensors.nbytes(row) * elements // whole
    return total


def _counted(report: Report, counters: Counters) -> None:
    """Put what an execution did in the place of what was planned, or add it to what is there."""
    if report.phases is None and report.kind is None:
        report.bytes_read = (report.bytes_read or 0) + counters.bytes_read
        report.requests = (report.requests or 0) + counters.requests
    else:
        report.bytes_read, report.requests = counters.bytes_read, counters.requests
    report.peak_extra_bytes = max(report.peak_extra_bytes or 0, counters.peak_extra_bytes)


def _by_rule(made: _Made) -> tuple[Mapping[str, Any], ...] | None:
    """Return, for each way of sharing, how many tensors and bytes of the rank it makes."""
    if made.kinds is None:
        return None
    found: dict[str, list[int]] = {}
    row = made.plan.catalog.row
    for dest, name in enumerate(made.plan.tensors.names):
        kind = made.kinds[row[name]]
        entry = found.setdefault(describe(kind), [0, 0])
        entry[0] += 1
        entry[1] += made.plan.tensors.nbytes(dest)
    return tuple(
        {"rule": how, "tensors": count, "bytes": nbytes} for how, (count, nbytes) in found.items()
    )


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


def _refuse_nested(source: str, out: str) -> None:
    """Refuse a target that is the source, inside it or around it; or that is no directory."""
    here, there = os.path.realpath(source), os.path.realpath(out)
    if here == there or os.path.commonpath([here, there]) in (here, there):
        relation = (
            "is" if here == there else "lies inside" if there.startswith(here) else "contains"
        )
        raise TargetError(f"{out}: {relation} the source {source}; choose a directory beside it")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise TargetError(f"{out}: is no directory; choose another place")


def _identity(checkpoint: Checkpoint) -> tuple[tuple[int | str, ...], ...]:
    assert checkpoint.catalog is not None
    entries = checkpoint.storage.entries()
    return tuple((name, *entries[name].identity) for name in checkpoint.catalog.files)


def _write(
    checkpoint: Checkpoint,
    target: LocalStorage,
    writer: SetWriter,
    plans: Mapping[int, Plan],
    parts: Mapping[int, Sequence[PartFile]],
    provenance: Mapping[int, bytes],
    reads: Sequence[Read],
    report: Report,
    *,
    force: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    """Write what is not there yet, commit each rank, and the set if it is complete."""
    kept = writer.begin(parts, force=force)
    if kept is None:
        report.notes = (f"{target.location} holds this set already; nothing was written",)
        report.bytes_read, report.requests, report.committed = 0, 0, True
        report.peak_extra_bytes = 0
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
    if len(kept) < len(plans) or any(kept.values()):
        reads = _file_reads([plans[rank] for rank in ranks], wanted)
    with FilesTarget(target, rest, finished) as files:
        counters = execute(
            reads,
            storage=checkpoint.storage,
            target=files,
            threads=threads,
            progress=progress,
            fills_memory=False,
        )
    _counted(report, counters)
    for rank in ranks:
        writer.finish_rank(
            rank,
            [entries[rank][part.part] for part in parts[rank]],
            padding=padding_boxes(plans[rank].fills, plans[rank].tensors),
            provenance=provenance[rank],
        )
    lacking = writer.commit()
    report.committed = not lacking
    if lacking:
        _log.warning(
            "shardstate: %s is not committed yet: ranks %s are missing",
            target.location,
            ", ".join(map(str, lacking)),
        )


def _verified(report: Report, found: Verification, full: bool) -> None:
    info = found.manifest.info if found.manifest else None
    if info is None and found.records:
        info = next(iter(found.records.values())).info
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
    report.materialised = report.materialised_bytes = 0
    if info is not None:
        report.layout, report.stage = info.layout, info.stage
        report.topology = _sizes(info.shape)
        report.committed = found.manifest is not None
    if found.manifest is not None:
        report.set = found.manifest.set
