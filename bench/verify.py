"""What does comparing digests while loading cost, beside the least that hashing can cost?

The peer is a loop of two threads that read 4 MiB of the rank's files and hash them, into one
buffer each. Everything is in the page cache, or with --cold nothing. Rounds are interleaved, in
another order each time; figures are medians. Prints one JSON line; `ratio` is the peer's time by
that of `load(verify=True)`.

    python bench/verify.py [--bytes 1000000000] [--rounds 7] [--cold] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path

from blake3 import blake3

from checkpoint import make_llama
from shardstate import shard
from shardstate.api import load_rank

_CHUNK = 4 << 20


def read_and_hash(files: list[Path]) -> float:
    """Return the seconds that two threads take to read and hash all files in 4 MiB pieces."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, _CHUNK)]
    fds = {file: os.open(file, os.O_RDONLY) for file in files}
    lock, left = threading.Lock(), iter(pieces)

    def work() -> None:
        buffer = memoryview(bytearray(_CHUNK))
        while True:
            with lock:
                piece = next(left, None)
            if piece is None:
                return
            count = os.preadv(fds[piece[0]], [buffer], piece[1])
            blake3(buffer[:count]).digest()

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    for fd in fds.values():
        os.close(fd)
    return took


def drop(files: list[Path]) -> None:
    """Take files out of the page cache, as far as the kernel does it."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def load_seconds(path: Path, *, verify: bool) -> tuple[float, float]:
    """Return the seconds of loading rank 0, and those that hashing took of all threads."""
    arrays, report = load_rank(path, rank=0, verify=verify)
    del arrays
    assert report.seconds is not None
    return report.seconds, report.hashing or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    options = parser.parse_args()
    source = options.work / f"llama-{options.bytes}"
    target = options.work / f"verify-{options.bytes}"
    if not (source / "config.json").exists():
        options.work.mkdir(parents=True, exist_ok=True)
        make_llama(source, nbytes=options.bytes, files=1)
    shard(source, target, tp=1, layout="rules")
    files = sorted(target.glob("*.safetensors"))
    ways = {
        "loop": lambda: (read_and_hash(files), 0.0),
        "verify": lambda: load_seconds(target, verify=True),
        "plain": lambda: load_seconds(target, verify=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    hashing = []
    for number in range(options.rounds + 1):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            if options.cold:
                drop(files)
            seconds, hashed = ways[name]()
            if number:  # the first round warms the cache and counts for nobody
                times[name].append(seconds)
                if name == "verify":
                    hashing.append(hashed)
    medians = {name: round(statistics.median(each), 4) for name, each in times.items()}
    result = {
        "bench": "verify",
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": medians,
        "hashing": round(statistics.median(hashing), 4),
        "ratio": round(medians["loop"] / medians["verify"], 3),
        "cold": options.cold,
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
