"""How fast are `verify --full` and a load that verifies, beside a loop that reads and hashes?

The loop is two threads, each of which reads 4 MiB and hashes it. A load has to keep what it reads:
beside it, the same loop that reads each 4 MiB to a place of its own. 2.2 GB in one rank file, in
the page cache and not (proven); parameters were written before. Rounds are interleaved; figures are
medians of seconds. A ratio above 1 says that the loop is slower. Prints one JSON line.

    python bench/verify.py [--rounds 7] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import threading
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

import shardstate
from checkpoint import make_llama
from residency import cold, warm
from rounds import figures, machine, take_turns
from shardstate.buffers import staging_buffer
from shardstate.raw import touched
from shardstate.torch import load, load_model

CHUNK = 4 << 20


def hash_files(files: Sequence[Path], kept: np.ndarray | None = None, threads: int = 2) -> None:
    """Read and hash all bytes, 4 MiB at a time; `kept` receives them, one file after the other."""
    firsts = dict(zip(files, accumulate([0, *(f.stat().st_size for f in files)]), strict=False))
    chunks = iter([(f, at) for f in files for at in range(0, f.stat().st_size, CHUNK)])
    opened = {file: open(file, "rb", buffering=0) for file in files}  # noqa: SIM115
    lock = threading.Lock()

    def work() -> None:
        room = staging_buffer(CHUNK)  # page-aligned: the kernel copies thrice as fast to it
        while True:
            with lock:
                found = next(chunks, None)
            if found is None:
                return
            if kept is not None:
                room = kept[firsts[found[0]] + found[1] :][:CHUNK]
            count = os.preadv(opened[found[0]].fileno(), [room.data], found[1])
            blake3(room.data[:count]).digest()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for file in opened.values():
        file.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    logging.getLogger("shardstate").setLevel(logging.ERROR)
    source, target = arguments.work / "llama-2.2GB", arguments.work / "tp1"
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    shardstate.shard(source, target, tp=1, layout="rules")
    files = sorted(target.glob("*.safetensors"))
    goals = {name: torch.zeros_like(tensor) for name, tensor in load(target, rank=0).items()}
    kept = touched(sum(file.stat().st_size for file in files))
    reports: list[shardstate.Report] = []
    ways = {
        "verify --full": lambda: reports.append(shardstate.verify(target, full=True)),
        "load_model, verify": lambda: load_model(goals, target, verify=True),
        "loop of 2 threads": lambda: hash_files(files),
        "loop that keeps the bytes": lambda: hash_files(files, kept),
    }
    states = {}
    for state, prepare in (("warm", warm), ("cold", cold)):
        seconds = take_turns(ways, before=partial(prepare, files), rounds=arguments.rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        loop = medians.pop("loop of 2 threads")
        states[state] = {
            "seconds": {name: figures(values) for name, values in seconds.items()},
            "ratio": {name: round(loop / own, 3) for name, own in medians.items()},
        }
    assert not any(report.problems for report in reports)
    result = {
        "bench": "verify",
        "bytes": sum(file.stat().st_size for file in files),
        "rounds": arguments.rounds,
        "states": states,
        "peak_extra_bytes": max(report.peak_extra_bytes or 0 for report in reports),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
