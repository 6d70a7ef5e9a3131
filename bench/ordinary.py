"""How fast does rank 0 of 8 come out of an ordinary checkpoint of 2.2 GB, cold, and what is read?

Beside the peers of `peers.py`, which read everything and narrow, `safe_open` with `get_slice`, and
raw reads of the whole files. `pages` is what a rank needs in whole pages of 4096 bytes: no reader
can do with less; `limit_seconds` is that by the best raw throughput of this run, chosen on half of
the rounds and taken from the others. Parameters were written before; residency is proven; results
are compared bit for bit. Prints one JSON line.

    python bench/ordinary.py [--rounds 5] [--tp 8] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

import shardstate
from checkpoint import make_llama
from peers import PEERS, Take
from residency import cold
from rounds import best_of, figures, machine, take_turns
from shardstate.api.planners import Request, rank_plan
from shardstate.dtypes import DTYPES
from shardstate.layout import runs
from shardstate.raw import SWEEP, Span, read_spans, room_for, touched
from shardstate.torch import load, load_model

PAGE = 4096
CHUNK = 4 << 20  # smaller ones are never the best raw setting; `load.py` tries them all


def pages_of(source: Path, tp: int) -> int:
    """Return the bytes of all pages that hold a byte of what rank 0 wants."""
    touched_pages: set[tuple[str, int]] = set()
    with shardstate.open(source) as checkpoint:
        plan = rank_plan(checkpoint, 0, tp=tp, layout="rules", request=Request(tp=tp)).plan
        for copy in plan:
            tensor = plan.catalog.tensor(copy.source)
            width = DTYPES[copy.source_dtype].itemsize
            for begin, end in runs(copy.move.source_region):
                first = (tensor.begin + begin * width) // PAGE
                last = (tensor.begin + end * width - 1) // PAGE
                touched_pages.update((tensor.file, page) for page in range(first, last + 1))
    return PAGE * len(touched_pages)


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
    memory = touched(room_for(spans))
    sweep = [s for s in SWEEP if s.chunk_bytes >= CHUNK and s.threads in (1, 4, 8, 16)]
    raw = {f"raw {setting}": partial(read_spans, spans, setting, memory) for setting in sweep}
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
        loading | raw, before=partial(cold, files), rounds=arguments.rounds, after=compared
    )
    own = statistics.median(seconds["shardstate"])
    best, took = best_of(seconds, list(raw))
    peer, peer_took = best_of(seconds, [name for name in loading if name != "shardstate"])
    pages = pages_of(source, tp)
    limit = pages / (total / took)
    report = reports[-1]
    result = {
        "bench": "ordinary",
        "tp": tp,
        "file_bytes": total,
        "bytes": report.bytes,
        "bytes_wanted": report.bytes_wanted,
        "bytes_read": report.bytes_read,
        "pages": pages,
        "rounds": arguments.rounds,
        "seconds": {name: figures(seconds[name]) for name in loading},
        "best_raw": best,
        "best_raw_gbps": round(total / took / 1e9, 3),
        "limit_seconds": round(limit, 3),
        "share_of_limit": round(limit / own, 3),
        "best_peer": peer,
        "times_best_peer": round(peer_took / own, 2),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
