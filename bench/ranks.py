"""Four ranks of one machine load one ordinary checkpoint of 2.2 GB at once: how often is it read?

Each rank is a process of its own, whose parameters were written before; all begin together, cold.
`read` is what the disk delivered (the kernel's count for the device) by the size of the files.
Beside `safe_open` with narrowing, and shardstate made to read past the page cache, which cannot
share. Each rank's result is compared with what one process loads. Prints one JSON line.

    python bench/ranks.py [--rounds 5] [--ranks 4] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoint import make_llama
from residency import cold
from rounds import figures, machine
from shardstate.api.planners import Request, rank_plan
from shardstate.api.planning import open_path, reads_of
from shardstate.engine import execute
from shardstate.storage import Reading
from shardstate.targets import MemoryTarget
from shardstate.torch import load

WAYS = ("shardstate", "shardstate, direct", "safe_open + copy_")


def disk_bytes(path: Path) -> int:
    """Return how many bytes the device below `path` has delivered so far."""
    device = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(stat.read_text().split()[2]) * 512


def work(source: Path, way: str, rank: int, ranks: int) -> None:
    """Be one rank: say when ready, load when told, say how long it took and whether it is right."""
    logging.getLogger("shardstate").setLevel(logging.ERROR)
    expected = load(source, rank=rank, tp=ranks)
    goals = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    if way == "safe_open + copy_":
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor, goal = opened.get_tensor(name), goals[name]
                    for axis, size in enumerate(goal.shape):
                        if size != tensor.shape[axis]:
                            tensor = tensor.narrow(axis, rank * size, size)
                    goal.copy_(tensor)
    else:
        with open_path(source) as checkpoint:
            if way == "shardstate, direct":
                checkpoint.storage.reading = Reading(direct=True)
            made = rank_plan(checkpoint, rank, tp=ranks, layout="rules", request=Request(tp=ranks))
            raw = [goals[n].view(-1).view(torch.uint8).numpy() for n in made.plan.tensors.names]
            execute(
                reads_of([made.plan], threads=2),
                storage=checkpoint.storage,
                target=MemoryTarget(raw, digests=None),
                threads=2,
                progress=None,
                fills_memory=False,
            )
    took = time.perf_counter() - began
    same = all(
        torch.equal(tensor.view(torch.int16), goals[name].view(torch.int16))
        for name, tensor in expected.items()
    )
    print(json.dumps({"seconds": took, "same": same}), flush=True)


def together(source: Path, way: str, ranks: int) -> tuple[float, int]:
    """Return the seconds until the last of all ranks was done, and what the disk delivered."""
    here = [sys.executable, __file__, "--work", source.parent, "--ranks", str(ranks)]
    workers = [
        subprocess.Popen(
            [*here, "--way", way, "--rank", str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    cold(sorted(source.glob("*.safetensors")))
    before, began = disk_bytes(source), time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    found = [json.loads(worker.stdout.readline()) for worker in workers if worker.stdout]
    took = time.perf_counter() - began
    delivered = disk_bytes(source) - before
    for worker in workers:
        worker.communicate()
    if not all(each["same"] for each in found):
        raise SystemExit(f"{way}: results differ")
    return took, delivered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.work / "llama-2.2GB"
    if arguments.way:
        work(source, arguments.way, arguments.rank, arguments.ranks)
        return
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    delivered: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            took, nbytes = together(source, way, arguments.ranks)
            seconds[way].append(took)
            delivered[way].append(nbytes / total)
    own = statistics.median(seconds["shardstate"])
    result = {
        "bench": "ranks",
        "ranks": arguments.ranks,
        "file_bytes": total,
        "rounds": arguments.rounds,
        "seconds": {way: figures(values) for way, values in seconds.items()},
        "read": {way: figures(values, 2) for way, values in delivered.items()},
        "times": {w: round(statistics.median(values) / own, 2) for w, values in seconds.items()},
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
