"""How fast is `verify --full`, beside a loop of two threads that reads 4 MiB and hashes it?

2.2 GB in rank files for 8 ranks, in the page cache (proven). Rounds are interleaved; figures are
medians of seconds. `ratio` above 1: verify is faster. Prints one JSON line.

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
from pathlib import Path

from blake3 import blake3

import shardstate
from checkpoint import make_llama
from residency import warm
from rounds import figures, machine, take_turns

CHUNK = 4 << 20


def hash_files(files: Sequence[Path], threads: int = 2) -> None:
    """Read and hash all bytes, 4 MiB at a time."""
    chunks = iter([(f, at) for f in files for at in range(0, f.stat().st_size, CHUNK)])
    opened = {file: open(file, "rb", buffering=0) for file in files}  # noqa: SIM115
    lock = threading.Lock()

    def work() -> None:
        room = bytearray(CHUNK)
        while True:
            with lock:
                found = next(chunks, None)
            if found is None:
                return
            count = os.preadv(opened[found[0]].fileno(), [room], found[1])
            blake3(memoryview(room)[:count]).digest()

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
    source, target = arguments.work / "llama-2.2GB", arguments.work / "tp8"
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    shardstate.shard(source, target, tp=8, layout="rules")
    files = sorted(target.glob("*.safetensors"))
    reports: list[shardstate.Report] = []
    seconds = take_turns(
        {
            "verify --full": lambda: reports.append(shardstate.verify(target, full=True)),
            "loop of 2 threads": lambda: hash_files(files),
        },
        before=lambda: warm(files),
        rounds=arguments.rounds,
    )
    assert not any(report.problems for report in reports)
    loop, own = (statistics.median(seconds[n]) for n in ("loop of 2 threads", "verify --full"))
    nbytes = sum(file.stat().st_size for file in files)
    result = {
        "bench": "verify",
        "bytes": nbytes,
        "rounds": arguments.rounds,
        "seconds": {name: figures(values) for name, values in seconds.items()},
        "gbps": round(nbytes / own / 1e9, 2),
        "ratio": round(loop / own, 3),
        "peak_extra_bytes": max(report.peak_extra_bytes or 0 for report in reports),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
