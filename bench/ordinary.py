"""How fast does rank 0 of 8 come out of an ordinary checkpoint of 2.2 GB, and what is read?

Cold and warm, beside the peers of `peers.py`, which read everything and narrow, and `safe_open`
with `get_slice`. Cold also beside raw reads: of the whole files, of the very ranges that shardstate
reads, and of the pages alone that hold what the rank needs: no reader can do with less. The kernel
is asked for these by lists (`process_madvise`), so that no call is made for each.
`limit_seconds` is the pages by the best raw throughput of whole files in this run. The best of
several is chosen on half of the rounds and taken from the others. Parameters were written before;
residency is proven; results are compared bit for bit. Prints one JSON line.

    python bench/ordinary.py [--rounds 5] [--tp 8] [--work bench/out]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import mmap
import os
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import shardstate
from checkpoint import make_llama
from peers import PEERS, Take
from residency import cold, warm
from rounds import best_of, figures, machine, take_turns
from shardstate.api.planners import Request, rank_plan
from shardstate.api.planning import reads_of
from shardstate.buffers import PAGE_BYTES as PAGE
from shardstate.dtypes import DTYPES
from shardstate.layout import runs
from shardstate.plan import Plan
from shardstate.raw import SWEEP, Setting, Span, read_spans, room_for, touched
from shardstate.storage import LocalStorage
from shardstate.storage.libc import LIBC
from shardstate.storage.output import IOV_MAX
from shardstate.torch import load, load_model

PROCESS_MADVISE = 440  # the number of the system call, on all architectures
CHUNK = 4 << 20  # smaller ones are never the best raw setting; `load.py` tries them all


def ranges_of(source: Path, plan: Plan) -> list[Span]:
    """Return the ranges that shardstate reads for `plan`."""
    reads = reads_of([plan], threads=LocalStorage.traits.read_threads, direct=True)
    return [Span(os.fspath(source / r.file), r.begin, r.end) for r in reads if r.file is not None]


def pages_of(source: Path, plan: Plan) -> dict[Path, np.ndarray]:
    """Return by file the pages that hold a byte of what `plan` wants: rows of first and last."""
    touched_pages: dict[str, set[int]] = defaultdict(set)
    for copy in plan:
        tensor = plan.catalog.tensor(copy.source)
        width = DTYPES[copy.source_dtype].itemsize
        for begin, end in runs(copy.move.source_region):
            first = (tensor.begin + begin * width) // PAGE
            last = (tensor.begin + end * width - 1) // PAGE
            touched_pages[tensor.file].update(range(first, last + 1))
    found = {}
    for name, pages in touched_pages.items():
        ordered = np.array(sorted(pages))
        ends = np.flatnonzero(np.append(np.diff(ordered) > 1, True))
        begins = np.append(0, ends[:-1] + 1)
        found[source / name] = np.stack([ordered[begins], ordered[ends] + 1], axis=1)
    return found


def read_pages(wanted: dict[Path, np.ndarray]) -> None:
    """Have the kernel read these pages and no others into its cache, and wait until they came."""

    def read(file: Path, pages: np.ndarray) -> None:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as m:
            found = np.frombuffer(m, dtype=np.uint8)
            lists = np.stack([pages[:, 0], pages[:, 1] - pages[:, 0]], axis=1) * PAGE
            lists[:, 0] += found.ctypes.data
            for at in range(0, len(lists), IOV_MAX):
                part = np.ascontiguousarray(lists[at : at + IOV_MAX])
                address, count = ctypes.c_void_p(part.ctypes.data), ctypes.c_size_t(len(part))
                if LIBC.syscall(PROCESS_MADVISE, own, address, count, mmap.MADV_WILLNEED, 0) < 0:
                    raise OSError(ctypes.get_errno(), "process_madvise")
            counts = pages[:, 1] - pages[:, 0]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found[(np.repeat(pages[:, 0], counts) + within) * PAGE].sum()
            del found

    own = os.pidfd_open(os.getpid())
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, wanted, wanted.values()))
    finally:
        os.close(own)


def narrowing(goals: dict[str, torch.Tensor]) -> Take:
    """Return what copies the leading part of a tensor, rank 0's, to the goal of its name."""

    def take(name: str, tensor: torch.Tensor) -> None:
        goal = goals[name]
        for axis, size in enumerate(goal.shape):
            tensor = tensor.narrow(axis, 0, size)
        goal.copy_(tensor)

    return take


def by_get_slice(files: list[Path], goals: dict[str, torch.Tensor]) -> None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = tuple(slice(0, size) for size in goals[name].shape)
                goals[name].copy_(opened.get_slice(name)[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    logging.getLogger("shardstate").setLevel(logging.ERROR)
    source, tp = arguments.work / "llama-2.2GB", arguments.tp
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    files = sorted(source.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    expected = load(source, rank=0, tp=tp)
    goals = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
    spans = [Span(os.fspath(file), 0, file.stat().st_size) for file in files]
    with shardstate.open(source) as checkpoint:
        plan = rank_plan(checkpoint, 0, tp=tp, layout="rules", request=Request(tp=tp)).plan
    ranges, pages = ranges_of(source, plan), pages_of(source, plan)
    memory = touched(max(room_for(spans), room_for(ranges)))
    sweep = [s for s in SWEEP if s.chunk_bytes >= CHUNK and s.threads in (1, 4, 8, 16)]
    raw = {f"raw {setting}": partial(read_spans, spans, setting, memory) for setting in sweep}
    some = (Setting(16, 1 << 20, True), *(s for s in sweep if s.chunk_bytes == CHUNK))
    parts = {f"ranges {s}": partial(read_spans, ranges, s, memory) for s in some}
    reports: list[shardstate.Report] = []
    loading = {
        "shardstate": lambda: reports.append(load_model(goals, source, rank=0, tp=tp)),
        "safe_open, get_slice": partial(by_get_slice, files, goals),
    }
    loading |= {name: partial(peer, files, narrowing(goals)) for name, peer in PEERS.items()}

    def compared(name: str) -> None:
        if name in loading:
            for key, tensor in expected.items():
                if not torch.equal(tensor.view(torch.int16), goals[key].view(torch.int16)):
                    raise SystemExit(f"{name}: {key} differs")
                goals[key].fill_(1)

    seconds = take_turns(
        loading | raw | parts | {"pages": partial(read_pages, pages)},
        before=partial(cold, files),
        rounds=arguments.rounds,
        after=compared,
    )
    own = statistics.median(seconds["shardstate"])
    best, took = best_of(seconds, list(raw))
    part, part_took = best_of(seconds, list(parts))
    peer, peer_took = best_of(seconds, [name for name in loading if name != "shardstate"])
    page_bytes = PAGE * sum(int((each[:, 1] - each[:, 0]).sum()) for each in pages.values())
    limit = page_bytes / (total / took)
    report = reports[-1]
    hot = take_turns(loading, before=partial(warm, files), rounds=arguments.rounds, after=compared)
    result = {
        "bench": "ordinary",
        "tp": tp,
        "file_bytes": total,
        "bytes": report.bytes,
        "bytes_wanted": report.bytes_wanted,
        "bytes_read": report.bytes_read,
        "pages": page_bytes,
        "rounds": arguments.rounds,
        "seconds": {name: figures(seconds[name]) for name in loading},
        "warm_seconds": {name: figures(hot[name]) for name in loading},
        "best_raw": best,
        "best_raw_gbps": round(total / took / 1e9, 3),
        "limit_seconds": round(limit, 3),
        "share_of_limit": round(limit / own, 3),
        "best_ranges": part,
        "ranges_seconds": figures(seconds[part]),
        "share_of_ranges": round(part_took / own, 3),
        "pages_seconds": figures(seconds["pages"]),
        "best_peer": peer,
        "times_best_peer": round(peer_took / own, 2),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
