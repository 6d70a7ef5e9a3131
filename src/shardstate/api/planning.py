"""What the operations share: opening, rules, plans, reads, and the figures of a report."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from shardstate.catalog import Tensors
from shardstate.checkpoint import Checkpoint, open_checkpoint
from shardstate.coalesce import Read, plan_reads
from shardstate.digest import BLOCK_BYTES
from shardstate.dtypes import CAST_NAMES, DTYPES
from shardstate.engine import STAGING_BYTES, Counters
from shardstate.errors import (
    InputError,
    PathNotFound,
    RulesError,
    SetError,
    UsageError,
)
from shardstate.names import CONFIG
from shardstate.plan import (
    Plan,
    bytes_wanted,
    check_plan,
    padding_boxes,
    plan_identity,
)
from shardstate.report import Report
from shardstate.sharding import (
    TABLES,
    Kind,
    Rule,
    Topology,
    check_shares,
    match_rules,
    parse_rules,
)
from shardstate.storage import Access, LocalStorage, Traits, is_address, storage_at
from shardstate.storage.adaptive import MOST_THREADS
from shardstate.storage.oserrors import mapped_errors
from shardstate.trust import own_digest

_log = logging.getLogger("shardstate")

PIECE_BYTES = BLOCK_BYTES  # so that pieces of contiguous tensors are whole digest blocks
READ_BYTES = PIECE_BYTES
LONG_READ_BYTES = 16 << 20  # of what takes no memory on its way
_GRAIN_BYTES = 64 << 10
_MAX_RULES_BYTES = 16 << 20

RulesArgument = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None


def open_path(
    path: str | os.PathLike[str], *, pattern: str | None = None, access: Access | None = None
) -> Checkpoint:
    """Open what lies at `path`: an ordinary checkpoint, a set of ours, or one that vLLM wrote.

    Reads headers and small JSON files only. `pattern` names the rank files of vLLM's own sets;
    `access` says how to reach what is not local.
    """
    storage = storage_at(path, access or Access())
    try:
        return open_checkpoint(storage, pattern=pattern)
    except InputError as error:
        storage.close()
        raise error.located(storage.location) from None


def asked_for(access: Access | None, threads: int | None) -> Access:
    """Return `access` with the number of reads in flight that a caller gives, if any."""
    access = access or Access()
    if threads is None:
        return access
    return replace(access, reading=replace(access.reading, threads=threads))


def local_path(path: str | os.PathLike[str]) -> str:
    """Return `path` as text; `UsageError` for an address of something that is not local."""
    text = os.fspath(path)
    if not text or is_address(text):
        raise UsageError(f"{text!r}: is no local directory, and only such can be a cache")
    return text


def describe_checkpoint(checkpoint: Checkpoint) -> Report:
    info = checkpoint.info
    return Report(
        kind=checkpoint.kind,
        layout=info.layout if info else "vllm" if checkpoint.kind == "vllm" else None,
        stage=checkpoint.stage,
        dtype=info.dtype if info else None,
        topology=sizes_of(checkpoint.topology),
        set=checkpoint.set_id,
        committed=checkpoint.committed,
        digest=own_digest(checkpoint.manifest_bytes) if checkpoint.manifest is not None else None,
        materialised=0,
        materialised_bytes=0,
    )


def sizes_of(topology: Topology | None) -> dict[str, int] | None:
    if topology is None:
        return None
    return {"tp": topology.tp, "pp": topology.pp, "dp": topology.dp}


def set_plan(
    checkpoint: Checkpoint, rank: int, *, tp: int | None, pp: int | None, dtype: str
) -> Plan:
    """Return the plan that takes `rank` of a set as it is, after checking the flags against it."""
    topology, info = checkpoint.topology, checkpoint.info
    assert topology is not None
    for flag, asked, there in (("tp", tp, topology.tp), ("pp", pp, topology.pp)):
        if asked is not None and asked != there:
            raise UsageError(
                f"{checkpoint.location}: is a set for {flag} {there}, and {flag} {asked} was asked "
                f"for; leave --{flag} out, or shard the source for {asked} ranks"
            )
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
            f"{checkpoint.location}: has no record of rank {rank}; finish the set: "
            f"{'save that rank' if checkpoint.stage == 'model' else f'shard --ranks {rank}'}"
        )
    return plan_identity(checkpoint.rank_catalog(rank))


def rules_of(checkpoint: Checkpoint, rules: RulesArgument) -> tuple[tuple[Rule, ...], str]:
    """Return the resolved rules and where they come from."""
    config = checkpoint.config()
    if isinstance(rules, str | os.PathLike):
        file = Path(rules)
        if file.is_dir():
            raise PathNotFound(f"{file}: is a directory, expected a rules file", file=str(file))
        with mapped_errors("read the rules", str(file), name=str(file)):
            if file.stat().st_size > _MAX_RULES_BYTES:
                raise RulesError(f"{file}: is too large for a rules file", file=str(file))
            data = file.read_bytes()
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


def kinds_of(
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


def extra_notes(checkpoint: Checkpoint, rank: int) -> list[str]:
    """Return a note for each rank file that is there and does not count, and log it."""
    notes = [
        f"{name} is there and no record lists it: it was not loaded; remove it"
        for name in (checkpoint.unlisted(rank) if checkpoint.catalog is None else ())
    ]
    for note in notes:
        _log.warning("shardstate: %s", note)
    return notes


def checked_dtype(dtype: str) -> str:
    if dtype not in CAST_NAMES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(CAST_NAMES)}")
    return dtype


def checked(made: Plan) -> Plan:
    check_plan(made)
    return made


def reads_of(
    plans: Sequence[Plan],
    *,
    threads: int,
    in_dest_order: bool = False,
    wanted: Sequence[frozenset[int]] | None = None,
    traits: Traits = LocalStorage.traits,
    direct: bool = False,
    hashed: bool = False,
) -> list[Read]:
    """Return the reads of `plans` for so many threads that their memory keeps to the budget.

    A thread holds what it reads, and as much again when that is moved, cast or grows by a cast.
    A local storage may choose to let as many as `MOST_THREADS` work. `traits` are those of the
    storage that is read. `direct`: what is contiguous goes straight to its destination, so that
    it takes no memory, and more may be asked for at once; of a store by multiples of that, since
    many keep an object in parts of such sizes, and look each of them up. `hashed`: digests are
    compared on the way, so that reads have to end where blocks do.
    """
    workers = threads if traits.remote else max(threads, MOST_THREADS)
    share = STAGING_BYTES // workers
    most = traits.chunk_bytes or LONG_READ_BYTES
    read_bytes = min(most, READ_BYTES, max(share // _GRAIN_BYTES, 1) * _GRAIN_BYTES)
    longest = min(most, LONG_READ_BYTES)
    on_grid = traits.remote and direct and not hashed and longest > read_bytes
    return plan_reads(
        plans,
        in_dest_order=in_dest_order,
        piece_bytes=min(PIECE_BYTES, read_bytes),
        read_bytes=read_bytes,
        max_gap_bytes=traits.max_gap_bytes,
        direct_bytes=longest if direct else 0,
        grid_bytes=longest if on_grid else 0,
        workers=workers,
        wanted=wanted,
    )


def write_planned(
    report: Report, plans: Sequence[Plan], reads: Sequence[Read], checkpoint: Checkpoint
) -> None:
    """Write the planned figures into `report`."""
    report.bytes = sum(nbytes_of(each.tensors) for each in plans)
    report.padding_bytes = sum(
        padding_bytes(padding_boxes(each.fills, each.tensors), each.tensors) for each in plans
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


def write_counted(report: Report, counters: Counters) -> None:
    """Put what an execution did in the place of what was planned."""
    report.bytes_read, report.requests = counters.bytes_read, counters.requests
    report.bytes_cached = counters.bytes_cached
    report.peak_extra_bytes = counters.peak_extra_bytes


def nbytes_of(tensors: Tensors) -> int:
    return sum(tensors.nbytes(row) for row in range(len(tensors)))


def padding_bytes(padding: Mapping[str, Sequence[Any]], tensors: Tensors) -> int:
    """Return the bytes of the boxes of `tensors` that hold no weights."""
    total = 0
    for name, boxes in padding.items():
        row = tensors.row[name]
        bits = DTYPES[tensors.dtypes[row]].bits
        total += sum(prod(end - begin for begin, end in box) * bits for box in boxes) // 8
    return total
