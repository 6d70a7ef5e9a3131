"""Measures reading on the user's own machine and files: this engine, a peer, the raw limits."""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardstate.api.planning import asked_for, describe_checkpoint, open_path, reads_of
from shardstate.api.writing import parse_size
from shardstate.catalog import Catalog
from shardstate.checkpoint import Checkpoint
from shardstate.engine import Progress, execute
from shardstate.errors import InputError, UsageError
from shardstate.plan import Plan, plan_identity
from shardstate.plot import Bar, bars_svg
from shardstate.raw import Setting, Span, drop, read_spans, resident, room_for, touched
from shardstate.report import Phases, Report
from shardstate.storage import Access, Storage, fetched
from shardstate.storage.oserrors import mapped_errors
from shardstate.targets import MemoryTarget

PEER = "shardstate.torch.peer:read_by_safetensors"
MAX_SIZE = "2GB"
_MIB = 1 << 20
_RAW = {
    "warm": (Setting(1, 4 * _MIB, False), Setting(2, _MIB, False), Setting(2, 4 * _MIB, False)),
    "cold": (
        Setting(4, 4 * _MIB, True),
        Setting(8, _MIB, True),
        Setting(16, 4 * _MIB, True),
        Setting(1, 16 * _MIB, False),
        Setting(2, 4 * _MIB, False),
        Setting(8, 4 * _MIB, False),
    ),
}
_REQUESTS, _REQUEST_BYTES = (4, 8, 16, 32, 64), 8 * _MIB
_COLD = 0.01  # so much may stay in the page cache where reading counts as cold
_ALIGN = 64  # of tensors in memory, as torch allocates them

Way = Callable[[], float]  # reads everything, and returns the seconds


def bench(
    path: str | os.PathLike[str],
    *,
    rounds: int = 3,
    max_size: int | str = MAX_SIZE,
    plot: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure how fast the tensors at `path` come into memory that was touched before.

    This engine, safetensors (where it and torch are installed) and raw reads of the same bytes take
    turns, warm and cold; cold only where the page cache lets go of the files. At a store, raw reads
    are ranged requests of the same client, and there is no peer. A hub's files are fetched first,
    and measured in its cache. `measured` has the figures, `notes` the verdict. Each way reads up to
    `max_size` bytes in each round; `plot` is a picture to write.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}, expected 1 or more")
    if access is not None and access.cache is not None:
        raise UsageError("bench measures what a store gives; leave the cache out")
    phases = Phases()
    notes: list[str] = []
    with open_path(path, access=asked_for(access, threads)) as checkpoint:
        with phases("open"):
            report = describe_checkpoint(checkpoint)
            plans = _chosen(checkpoint, parse_size(max_size))
            storage = _measured(checkpoint.storage, plans, notes)
            remote = storage.traits.remote
            spans = _spans("" if remote else storage.location, plans)
            report.bytes = sum(s.end - s.begin for s in spans)
            report.tensors = sum(len(plan) for plan in plans)
            report.files = len({span.path for span in spans})
            ours, size = _engine(storage, plans, threads or storage.traits.read_threads)
            memory = touched(max(size, room_for(spans)))
        measured: list[Mapping[str, Any]] = []
        peer = None if remote else _peer(notes)
        states = ("remote",) if remote else ("warm", "cold")
        for done, state in enumerate(states, 1):
            with phases(state):
                ways: dict[str, Way] = {"shardstate": partial(ours, memory)}
                if peer is not None:
                    ways["safetensors"] = partial(peer, spans, _names(plans), memory)
                for setting in _RAW.get(state, ()):
                    ways[f"raw {setting}"] = partial(read_spans, spans, setting, memory)
                for count in _REQUESTS if remote else ():
                    name = f"raw requests {count} × {_REQUEST_BYTES // _MIB} MiB"
                    ways[name] = partial(_request, storage, spans, count, memory)
                figures = _rounds(state, ways, spans, rounds, notes)
                measured += figures
                notes += _verdict(state, figures)
            if progress is not None:
                progress(done, len(states))
        report.measured = tuple(measured)
        report.notes = tuple(notes)
        if plot is not None:
            _draw(plot, measured)
    return phases.finish(report, main=None)


def _measured(storage: Storage, plans: Sequence[Plan], notes: list[str]) -> Storage:
    """Return the storage whose speed counts: of a hub, its cache, with the files in it."""
    found = fetched(storage, {tensor.file for plan in plans for tensor in plan.catalog})
    if found is not storage:
        notes.append(f"measured where the hub's cache has it: {found.location}")
    return found


def _chosen(checkpoint: Checkpoint, limit: int) -> list[Plan]:
    """Return plans that take tensors as they are stored, one for each rank, up to `limit` bytes.

    The first that are not too large, one after the other: few files, where they must be fetched.
    """
    catalogs = (
        [checkpoint.catalog]
        if checkpoint.catalog is not None
        else [checkpoint.rank_catalog(rank) for rank in checkpoint.ranks]
    )
    plans: list[Plan] = []
    for catalog in catalogs:
        rows = []
        for row in range(len(catalog)):
            if catalog.nbytes(row) <= limit:
                limit -= catalog.nbytes(row)
                rows.append(row)
            elif rows or plans:
                limit = 0
        if rows:
            plans.append(plan_identity(_part(catalog, rows)))
    if not any(len(plan) for plan in plans):
        raise InputError(f"{checkpoint.location}: holds no tensor that is small enough to be read")
    return plans


def _part(catalog: Catalog, rows: Sequence[int]) -> Catalog:
    return Catalog(
        tuple(catalog.names[row] for row in rows),
        tuple(catalog.dtypes[row] for row in rows),
        tuple(catalog.shapes[row] for row in rows),
        catalog.files,
        catalog.file_bytes,
        catalog.file[list(rows)],
        catalog.begin[list(rows)],
    )


def _names(plans: Sequence[Plan]) -> frozenset[str]:
    return frozenset(name for plan in plans for name in plan.tensors.names)


def _spans(location: str, plans: Sequence[Plan]) -> list[Span]:
    """Return what the plans read, as few spans of files as there are."""
    pieces = sorted(
        (tensor.file, tensor.begin, tensor.end) for plan in plans for tensor in plan.catalog
    )
    spans: list[Span] = []
    for name, begin, end in pieces:
        path = os.path.join(location, name)
        if spans and spans[-1].path == path and spans[-1].end == begin:
            spans[-1] = Span(path, spans[-1].begin, end)
        elif end > begin:
            spans.append(Span(path, begin, end))
    return spans


def _engine(
    storage: Storage, plans: Sequence[Plan], threads: int
) -> tuple[Callable[[np.ndarray], float], int]:
    """Return what reads everything with our engine, and how much memory that fills."""
    begins: list[int] = []
    size = 0
    for plan in plans:
        for row in range(len(plan.tensors)):
            begins.append(size)
            size += -(-plan.tensors.nbytes(row) // _ALIGN) * _ALIGN
    traits = storage.traits
    reads = [reads_of([plan], threads=threads, traits=traits, direct=True) for plan in plans]

    def read(memory: np.ndarray) -> float:
        at, seconds = iter(begins), 0.0
        for plan, own in zip(plans, reads, strict=True):
            goals = []
            for row in range(len(plan.tensors)):
                first = next(at)
                goals.append(memory[first : first + plan.tensors.nbytes(row)])
            began = time.perf_counter()
            execute(
                own,
                storage=storage,
                target=MemoryTarget(goals, digests=None),
                threads=threads,
                progress=None,
                fills_memory=False,
            )
            seconds += time.perf_counter() - began
        return seconds

    return read, size


def _request(storage: Storage, spans: Sequence[Span], count: int, memory: np.ndarray) -> float:
    """Ask a store for all of `spans`, with so many requests in flight; return the seconds."""
    requests = []
    at = 0
    for span in spans:
        for begin in range(span.begin, span.end, _REQUEST_BYTES):
            size = min(_REQUEST_BYTES, span.end - begin)
            requests.append((span.path, begin, [memory[at : at + size].data]))
            at += size
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(lambda request: storage.read_into(*request), requests):
            pass
    return time.perf_counter() - began


def _peer(notes: list[str]) -> Callable[[Sequence[Span], frozenset[str], np.ndarray], float] | None:
    lacking = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if lacking:
        notes.append(f"safetensors was not measured: {' and '.join(lacking)} not installed here")
        return None
    module, _, name = PEER.partition(":")
    found: Callable[..., float] = getattr(importlib.import_module(module), name)
    return found


def _rounds(
    state: str, ways: Mapping[str, Way], spans: Sequence[Span], rounds: int, notes: list[str]
) -> list[Mapping[str, Any]]:
    """Time each way in turn, so that what drifts drifts for all; return their figures."""
    nbytes = sum(span.end - span.begin for span in spans)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    if state == "warm":
        for way in (*ways.values(), next(iter(ways.values()))):
            way()  # twice, for the first: into the page cache, and to stay there
        share = resident(spans)
        if share is not None and share < 1 - _COLD:
            notes.append(f"warm: only {share:.0%} of the files stay in the page cache")
    for number in range(rounds):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if state == "cold":
                drop(spans)
                share = resident(spans)
                if share is None or share > _COLD:
                    what = "nothing tells what is cached" if share is None else f"{share:.0%} stays"
                    notes.append(f"cold was not measured: {what} when the files are dropped")
                    return []
            try:
                seconds[name].append(ways[name]())
            except OSError as error:
                notes.append(f"{name}: {os.strerror(error.errno or 0)}")
    return [
        {
            "name": name,
            "state": state,
            "seconds": (median := statistics.median(values)),
            "gbps": nbytes / median / 1e9,
            "gbps_min": nbytes / max(values) / 1e9,
            "gbps_max": nbytes / min(values) / 1e9,
            "rounds": len(values),
        }
        for name, values in seconds.items()
        if values
    ]


def _verdict(state: str, figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words how this engine did beside the others; a win within the spread is none."""
    by_name = {each["name"]: each for each in figures}
    own = by_name.pop("shardstate", None)
    if own is None:
        return []
    raw = max(
        (each for each in by_name.values() if each["name"].startswith("raw ")),
        key=lambda each: float(each["gbps"]),
        default=None,
    )
    said = [f"{state}: {own['gbps']:.2f} GB/s"]
    if raw is not None:
        share = own["gbps"] / raw["gbps"]
        best = f"the best raw setting here ({raw['name'].removeprefix('raw ')})"
        said.append(
            f"at the limit: {share:.2f} of {best}"
            if share >= 0.9
            else f"{share:.2f} of {best}: there is something to gain"
        )
    if (peer := by_name.get("safetensors")) is not None:
        ratio = own["gbps"] / peer["gbps"]
        overlap = own["gbps_min"] <= peer["gbps_max"] and peer["gbps_min"] <= own["gbps_max"]
        text = f"{ratio:.2f} × safetensors"
        said.append(f"{text}, within the spread of the rounds" if overlap else text)
    return ["; ".join(said)]


def _draw(plot: str | os.PathLike[str], measured: Sequence[Mapping[str, Any]]) -> None:
    groups = []
    for state in ("warm", "cold", "remote"):
        bars = [
            Bar(m["name"], m["gbps"], m["gbps_min"], m["gbps_max"], m["name"] == "shardstate")
            for m in measured
            if m["state"] == state
        ]
        if bars:
            groups.append((state, bars))
    with mapped_errors("write", os.fspath(plot)):
        Path(plot).write_text(bars_svg(groups, unit="GB/s"), encoding="utf-8")
