"""How fast does a rank come from an S3 server, beside runai-model-streamer and raw ranged GETs?

One server, SeaweedFS on loopback, that this starts and ends; rounds are interleaved, and their
order rotates. Both loaders fill memory that was touched before, which is compared bit by bit with
the files on disk. `raw` is parallel ranged GETs with the same client, obstore, into its own memory
and nowhere else; the better of two shapes counts. `kept` is what a load cannot do without: the same
GETs with If-Match, whose bytes are copied to their place. Prints one JSON line; figures are GB/s of
medians.

    make bench-stores, or python bench/stores.py [--bytes 2000000000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "stores"))

import numpy as np
from servers import ACCESS_KEY, SECRET_KEY, seaweedfs

import shardstate
from checkpoint import make_llama
from shardstate.api.planning import reads_of
from shardstate.engine import execute
from shardstate.plan import plan_identity
from shardstate.storage import Access, paced
from shardstate.targets import MemoryTarget

if TYPE_CHECKING:
    from obstore import GetOptions

BUCKET = "s3://bucket/model"
RAW_SHAPES = ((8, 8 << 20), (16, 4 << 20))  # threads, bytes of a GET


def ours(
    access: Access, memory: dict[str, np.ndarray], address: str = BUCKET
) -> tuple[float, float]:
    """Return the seconds of opening, planning and reading into `memory`, and of reading alone.

    What an earlier load learnt of the store is forgotten.
    """
    paced._learnt.clear()
    began = time.perf_counter()
    with shardstate.open(address, access=access) as checkpoint:
        plan = plan_identity(checkpoint.rank_catalog(0))
        traits = checkpoint.storage.traits
        threads = traits.read_threads
        reads = reads_of([plan], threads=threads, traits=traits, direct=True)
        opened = time.perf_counter()
        execute(
            reads,
            storage=checkpoint.storage,
            target=MemoryTarget([memory[name] for name in plan.tensors.names], digests=None),
            threads=threads,
            progress=None,
            fills_memory=False,
        )
        done = time.perf_counter()
    return done - began, done - opened


def runai(names: list[str], memory: dict[str, np.ndarray]) -> float:
    """Return the seconds until the last tensor is in `memory`."""
    import torch
    from runai_model_streamer import SafetensorsStreamer

    goals = {name: torch.from_numpy(array) for name, array in memory.items()}
    began = time.perf_counter()
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"{BUCKET}/{name}" for name in names])
        for name, tensor in streamer.get_tensors():
            goals[name].copy_(tensor.reshape(-1).view(torch.uint8))
    return time.perf_counter() - began


def raw(
    access: Access,
    sizes: dict[str, int],
    threads: int,
    step: int,
    kept: np.ndarray | None = None,
    *,
    address: str = BUCKET,
) -> float:
    """Return the seconds of getting all bytes of all files.

    With `kept` every request names the version of its object, which a load must do, and what comes
    is copied there, one file after the other.
    """
    import obstore

    from shardstate.storage.clients import Limits, connect, parse_address

    client = connect(parse_address(address), access.options, Limits(None, 60, 0))
    work = [(n, b, min(b + step, size)) for n, size in sizes.items() for b in range(0, size, step)]
    lock = threading.Lock()
    firsts = dict(zip(sizes, accumulate([0, *sizes.values()]), strict=False))
    etags = {name: obstore.head(client, name)["e_tag"] for name in sizes if kept is not None}

    def run() -> None:
        while True:
            with lock:
                if not work:
                    return
                name, begin, end = work.pop(0)
            if kept is None:
                got = obstore.get_range(client, name, start=begin, end=end)
            else:
                options: GetOptions = {"range": (begin, end), "if_match": etags[name]}
                got = obstore.get(client, name, options=options).bytes()
                kept[firsts[name] + begin : firsts[name] + end] = np.frombuffer(got, np.uint8)
            assert len(got) == end - begin

    began = time.perf_counter()
    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        source, stored = Path(work, "llama"), Path(work, "set")
        make_llama(source, nbytes=arguments.bytes, files=1)
        shardstate.shard(source, stored, tp=1, layout="rules", max_part_size="130MB")
        loaded = shardstate.load(stored, rank=0)
        expected = {name: array.reshape(-1).view(np.uint8) for name, array in loaded.items()}
        # Touched beforehand: parameters of a model are, and new pages cost more than a copy.
        memory = {name: np.ones_like(array) for name, array in expected.items()}
        sizes = {file.name: file.stat().st_size for file in sorted(stored.glob("*.safetensors"))}
        nbytes = sum(sizes.values())
        folder = Path(work, "server")
        folder.mkdir()
        with seaweedfs(folder) as server:
            access = Access(options=server.options)
            shardstate.copy(stored, BUCKET, access=access)
            os.environ |= {
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": server.endpoint,
                "AWS_EC2_METADATA_DISABLED": "true",
                "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            }
            seconds: dict[str, list[float]] = {}
            identical = {"shardstate": True, "runai": True}
            shapes = {f"raw {t} x {b >> 20} MiB": (t, b) for t, b in RAW_SHAPES}
            keeping = {f"{name}, If-Match, kept": shape for name, shape in shapes.items()}
            names = ["shardstate", "runai", *shapes, *keeping]
            kept = np.ones(nbytes, dtype=np.uint8)
            for number in range(arguments.rounds + 1):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    for array in memory.values():
                        array[:] = 1
                    if name == "shardstate":
                        took, reading = ours(access, memory)
                        if number:
                            seconds.setdefault("reading alone", []).append(reading)
                    elif name == "runai":
                        took = runai(list(sizes), memory)
                    elif name in keeping:
                        took = raw(access, sizes, *keeping[name], kept)
                    else:
                        took = raw(access, sizes, *shapes[name])
                    if name in identical:
                        identical[name] &= all(
                            np.array_equal(memory[each], expected[each]) for each in expected
                        )
                    if number:  # the first round warms up
                        seconds.setdefault(name, []).append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best_raw = min(medians[name] for name in shapes)
    best_kept = min(medians[name] for name in keeping)
    print(
        json.dumps(
            {
                "bench": "stores",
                "bytes": nbytes,
                "rounds": arguments.rounds,
                "gbps": {name: round(nbytes / value / 1e9, 3) for name, value in medians.items()},
                "seconds": {n: [round(v, 3) for v in values] for n, values in seconds.items()},
                "times_runai": round(medians["runai"] / medians["shardstate"], 2),
                "times_raw": round(best_raw / medians["shardstate"], 2),
                "reading_times_raw": round(best_raw / medians["reading alone"], 2),
                "reading_times_kept": round(best_kept / medians["reading alone"], 2),
                "identical": identical,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            }
        )
    )


if __name__ == "__main__":
    main()
