"""`save_model`: one rank of a module, from its own process, into a set that others write too."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch

from shardstate.api import MAX_PART_SIZE, parse_size
from shardstate.api.planning import nbytes_of, reads_of, sizes_of
from shardstate.coalesce import Read
from shardstate.commit import SetWriter
from shardstate.engine import Counters, Progress, execute
from shardstate.errors import InputError, TargetBusy, UsageError
from shardstate.manifest import PartEntry, SetInfo, Sizes
from shardstate.names import COMMIT_LOCK, check_pattern, default_pattern, lock_name
from shardstate.parts import PartFile, plan_parts
from shardstate.plan import Plan, bytes_wanted, padding_boxes
from shardstate.report import Phases, Report
from shardstate.sharding import Topology
from shardstate.storage import Access, Storage, Writable, writable_at
from shardstate.targets import FilesTarget
from shardstate.torch.aliases import equal_groups, filter_subtensors
from shardstate.torch.ranks import Place, broadcast_id, place_of
from shardstate.torch.tensors import TensorStorage, check_plain, plan_tensors

SAVE_THREADS = 2  # nothing is read from a disk: one hashes while the other writes
_COMMIT_SECONDS = 60.0  # a commit reads records and writes one small file
_SAVE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def save_model(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tp: int | None = None,
    pp_rank: int | None = None,
    pp: int | None = None,
    pattern: str | None = None,
    max_part_size: int | str = MAX_PART_SIZE,
    save_id: str | None = None,
    progress: Progress | None = None,
    access: Access | None = None,
    stage: str = "model",
) -> Report:
    """Save the state dict of one rank of `model` under `path`; the last rank commits the set.

    `rank` is the tensor-parallel rank. Where rank and sizes are not given they are those of the
    process group, if one is initialised, else rank 0 of 1. Every rank may save from its own
    process, at the same time. Of tensors that share memory one is stored (`filter_subtensors`).

    `save_id` names this generation of the set: rank 0's random one inside torch.distributed, a
    random one where there is a single rank; elsewhere give one that is new, and equal on all ranks.
    `ValueError` (`UsageError`) where it is missing, malformed, or there already for this rank.
    `stage` is "kernel" for tensors that an engine has repacked.
    """
    phases = Phases()
    with phases("plan"):
        place = place_of(rank=rank, tp=tp, pp_rank=pp_rank, pp=pp)
        topology = Topology(place.tp, place.pp)
        template = check_pattern(pattern or default_pattern(topology), topology)
        identifier = _checked_id(save_id, place)
        state = model.state_dict() if isinstance(model, torch.nn.Module) else dict(model)
        tensors = {
            # Lazily conjugated or negated memory holds other values than the tensor.
            name: value.detach().resolve_conj().resolve_neg()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        if others := sorted(set(state) - set(tensors)):
            raise InputError(
                f"{', '.join(others)}: no tensors (extra state of a module?); such modules cannot "
                f"be stored as safetensors",
                tensor=others[0],
            )
        check_plain(tensors)
        if lost := sorted(name for name, tensor in tensors.items() if tensor.is_meta):
            raise InputError(f"{lost[0]}: is on the meta device and has no bytes", tensor=lost[0])
        kept = filter_subtensors(tensors)
        plan = plan_tensors(kept)
        info = SetInfo(
            topology=Sizes(topology.tp, topology.pp),
            layout="rules",
            stage=stage,
            pattern=template.text,
            dtype="keep",
        )
        parts = plan_parts(
            plan.tensors,
            rank=place.index,
            set_id=identifier,
            pattern=template,
            max_part_bytes=parse_size(max_part_size),
        )
        reads = reads_of([plan], threads=SAVE_THREADS, in_dest_order=True)
        report = _planned(place, topology, identifier, info, parts)
        report.bytes, report.bytes_wanted = nbytes_of(plan.tensors), bytes_wanted([plan])
        report.tensors = len(plan.tensors)
    with phases("write"), closing(writable_at(path, access or Access(), outputs=1)) as target:
        counters, lacking = write_rank(
            target,
            set_id=identifier,
            info=info,
            rank=place.index,
            plan=plan,
            parts=parts,
            reads=reads,
            source=TensorStorage(kept),
            aliases=equal_groups(tensors),
            threads=SAVE_THREADS,
            progress=progress,
        )
    report.bytes_read, report.requests = counters.bytes_read, counters.requests
    report.peak_extra_bytes = counters.peak_extra_bytes
    report.committed = not lacking
    if lacking:
        report.notes = (f"committed when ranks {', '.join(map(str, lacking))} are saved too",)
    return phases.finish(report, main="write")


def write_rank(
    target: Writable,
    *,
    set_id: str,
    info: SetInfo,
    rank: int,
    plan: Plan,
    parts: Sequence[PartFile],
    reads: Sequence[Read],
    source: Storage,
    aliases: Sequence[tuple[str, ...]],
    threads: int,
    progress: Progress | None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Counters, tuple[int, ...]]:
    """Write and commit one rank of a set, others perhaps at the same time.

    `check` is called before the rank is committed, and may raise. Return what it took, and the
    ranks that the set still lacks; the last rank commits it.
    """
    with target.lock(lock_name(rank)):
        writer = SetWriter(target, set_id=set_id, info=info, companions=(), source_identity=())
        writer.begin_rank(rank)
        entries: dict[int, PartEntry] = {}
        with FilesTarget(
            target, [parts], lambda part, entry: entries.__setitem__(part.part, entry)
        ) as outputs:
            counters = execute(
                reads,
                storage=source,
                target=outputs,
                threads=threads,
                progress=progress,
                fills_memory=False,
            )
        check()
        writer.finish_rank(
            rank,
            [entries[part.part] for part in parts],
            padding=padding_boxes(plan.fills, plan.tensors),
            provenance=None,
            aliases=aliases,
        )
        return counters, _commit(target, writer)


def _commit(target: Writable, writer: SetWriter) -> tuple[int, ...]:
    """Commit, one rank at a time: two would write the manifest under one temporary name."""
    give_up = time.monotonic() + _COMMIT_SECONDS
    while True:
        try:
            with target.lock(COMMIT_LOCK):
                return writer.commit(shared=True)
        except TargetBusy:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _checked_id(save_id: str | None, place: Place) -> str:
    if save_id is None:
        if place.group:
            return broadcast_id()
        if place.world == 1:
            return secrets.token_hex(16)
        raise UsageError(
            f"save_id is missing: {place.world} ranks outside torch.distributed cannot agree on "
            f"one; give all of them the same new one"
        )
    if not _SAVE_ID.fullmatch(save_id):
        raise UsageError(f"save_id {save_id!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -")
    return save_id


def _planned(
    place: Place, topology: Topology, identifier: str, info: SetInfo, parts: list[PartFile]
) -> Report:
    files = tuple({"name": p.name, "bytes": p.nbytes, "rank": place.index} for p in parts)
    return Report(
        kind="shardstate",
        layout=info.layout,
        stage=info.stage,
        dtype=info.dtype,
        set=identifier,
        topology=sizes_of(topology),
        ranks=(place.index,),
        file_list=files,
        files=len(files),
        padding_bytes=0,
        bytes_meta=0,
        materialised=0,
        materialised_bytes=0,
    )
