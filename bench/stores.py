"""How fast does a rank come from an S3 server, beside runai-model-streamer and raw ranged GETs?

One server, SeaweedFS on loopback, that this starts and ends; rounds are interleaved, and their
order rotates. `raw` is parallel ranged GETs with the same client, obstore, into its own memory and
nowhere else; the better of two shapes counts. What the others loaded is compared bit by bit with
the files on disk. Prints one JSON line; figures are GB/s of medians.

    make bench-stores, or python bench/stores.py [--bytes 500000000] [--rounds 5]
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "stores"))

import numpy as np
from servers import ACCESS_KEY, SECRET_KEY, seaweedfs

import shardstate
from checkpoint import make_llama
from shardstate.storage import Access

BUCKET = "s3://bucket/model"
RAW_SHAPES = ((8, 8 << 20), (16, 4 << 20))  # threads, bytes of a GET


def ours(access: Access) -> tuple[float, dict[str, np.ndarray]]:
    """Return the seconds of opening, planning and reading, and the tensors."""
    began = time.perf_counter()
    found = shardstate.load(BUCKET, rank=0, access=access)
    return time.perf_counter() - began, found


def runai(names: list[str]) -> tuple[float, dict[str, np.ndarray]]:
    """Return the seconds until the last tensor is there, and the tensors."""
    from runai_model_streamer import SafetensorsStreamer

    began = time.perf_counter()
    found = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"{BUCKET}/{name}" for name in names])
        for name, tensor in streamer.get_tensors():
            found[name] = tensor.clone().view(-1)
    seconds = time.perf_counter() - began
    return seconds, {name: tensor.view(dtype=_uint8()).numpy() for name, tensor in found.items()}


def _uint8() -> object:
    import torch

    return torch.uint8


def raw(access: Access, sizes: dict[str, int], threads: int, step: int) -> float:
    """Return the seconds of getting all bytes of all files."""
    import obstore

    from shardstate.storage.clients import Limits, connect, parse_address

    client = connect(parse_address(BUCKET), access.options, Limits(None, 60, 0))
    work = [(n, b, min(b + step, size)) for n, size in sizes.items() for b in range(0, size, step)]
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                if not work:
                    return
                name, begin, end = work.pop(0)
            got = obstore.get_range(client, name, start=begin, end=end)
            assert len(got) == end - begin

    began = time.perf_counter()
    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(
        np.array_equal(found[n].reshape(-1).view(np.uint8), a.reshape(-1).view(np.uint8))
        for n, a in expected.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=500_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        source, stored = Path(work, "llama"), Path(work, "set")
        make_llama(source, nbytes=arguments.bytes, files=1)
        shardstate.shard(source, stored, tp=1, layout="rules", max_part_size="130MB")
        expected = shardstate.load(stored, rank=0)
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
            names = ["shardstate", "runai", *(f"raw {t} x {b >> 20} MiB" for t, b in RAW_SHAPES)]
            for number in range(arguments.rounds + 1):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    if name == "shardstate":
                        took, found = ours(access)
                    elif name == "runai":
                        took, found = runai(list(sizes))
                    else:
                        took = raw(access, sizes, *RAW_SHAPES[names.index(name) - 2])
                        found = {}
                    if found:
                        identical[name] &= same(found, expected)
                    del found
                    if number:  # the first round warms up
                        seconds.setdefault(name, []).append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best_raw = min(value for name, value in medians.items() if name.startswith("raw"))
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
                "identical": identical,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            }
        )
    )


if __name__ == "__main__":
    main()
