"""Does a load use a store that is far away, whose connections are slow, as well as raw GETs do?

A web server on loopback waits 40 ms before each answer and sends each at 90 MB/s, about what a
connection to S3 gives; with many of them the machine is the limit. Each load begins in a process
of its own, which knows nothing of the store. Rounds are interleaved; figures are GB/s of medians,
opening and planning included. Prints one JSON line.

    make bench-stores, or python bench/farstore.py [--bytes 2000000000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import re
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

import shardstate
from checkpoint import make_llama
from shardstate.raw import touched
from shardstate.storage import Access
from stores import ours, raw

RAW_SHAPES = ((16, 8 << 20), (32, 2 << 20), (32, 8 << 20), (64, 8 << 20))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    wait, rate = 0.04, 90e6

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, *, head: bool = False) -> None:
        time.sleep(self.wait)
        data = self.files.get(self.path.rpartition("/")[2])
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        begin, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(data))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        self.end_headers()
        body, began = memoryview(data)[begin:end], time.monotonic()
        for at in range(0, 0 if head else len(body), 1 << 20):
            part = body[at : at + (1 << 20)]
            self.wfile.write(part)
            time.sleep(max(0.0, began + (at + len(part)) / self.rate - time.monotonic()))


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 256


def serve(folder: Path) -> None:
    """Serve the files of `folder` until the process is ended; print the port."""
    _Handler.files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    server = _Server(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def load(address: str, expected: Path) -> None:
    """Load from `address` into memory that was touched; print the seconds."""
    loaded = shardstate.load(expected, rank=0)
    arrays = {name: array.reshape(-1).view(np.uint8) for name, array in loaded.items()}
    memory = {name: touched(len(array)) for name, array in arrays.items()}
    seconds, _ = ours(Access(), memory, address)
    assert all(np.array_equal(memory[name], arrays[name]) for name in arrays)
    print(seconds)


@contextlib.contextmanager
def server_of(folder: Path) -> Iterator[str]:
    """Return the address of a server of `folder`, a process of its own."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/set"
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--load", nargs=2)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    elif arguments.load:
        load(arguments.load[0], Path(arguments.load[1]))
    else:
        compare(arguments.bytes, arguments.rounds)


def compare(asked: int, rounds: int) -> None:
    """Let a load and raw requests take turns; print the result."""
    with tempfile.TemporaryDirectory() as work:
        source, stored = Path(work, "llama"), Path(work, "set")
        make_llama(source, nbytes=asked, files=1)
        shardstate.shard(source, stored, tp=1, layout="rules")
        sizes = {file.name: file.stat().st_size for file in sorted(stored.glob("*.safetensors"))}
        nbytes = sum(sizes.values())
        seconds: dict[str, list[float]] = {}
        with server_of(stored) as address:
            shapes = {f"raw {t} x {b >> 20} MiB": (t, b) for t, b in RAW_SHAPES}
            names = ["shardstate", *shapes]
            for number in range(rounds):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    if name in shapes:
                        took = raw(Access(), sizes, *shapes[name], address=address)
                    else:
                        command = [sys.executable, __file__, "--load", address, str(stored)]
                        took = float(subprocess.check_output(command, text=True))
                    seconds.setdefault(name, []).append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(medians[name] for name in shapes)
    print(
        json.dumps(
            {
                "bench": "farstore",
                "bytes": nbytes,
                "rounds": rounds,
                "gbps": {name: round(nbytes / value / 1e9, 3) for name, value in medians.items()},
                "seconds": {n: [round(v, 3) for v in values] for n, values in seconds.items()},
                "times_raw": round(best / medians["shardstate"], 2),
                "machine": f"{os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    main()
