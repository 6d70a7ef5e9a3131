"""How fast does one rank of 2.2 GB get from a set into parameters: warm, cold, half cached?

Beside the peers of `peers.py`, and raw reads of the same file: threads 1, 2, 4, 8, 16 × chunks of
1, 4, 16 MiB × past the page cache or through it, the best of them chosen on half of the rounds and
compared on the others. Parameters, and the memory of raw reads, were written before: touching
memory for the first time is slow here, and no part of reading. Residency is proven before each run.
Half cached, twelve of the settings are tried. All results are compared bit for bit. What one run
learnt of the disk is forgotten before the next. Prints one JSON line.

    python bench/load.py [--rounds 5] [--work bench/out] [--state warm …]
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

import shardstate
from checkpoint import make_llama
from peers import PEERS, copy_into
from residency import cold, half, warm
from rounds import best_of, figures, machine, take_turns
from shardstate.raw import SWEEP, Span, read_spans, room_for, touched
from shardstate.torch import load, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    parser.add_argument("--state", nargs="+", default=["warm", "cold", "half"])
    arguments = parser.parse_args()
    logging.getLogger("shardstate").setLevel(logging.ERROR)
    source, target = arguments.work / "llama-2.2GB", arguments.work / "tp1"
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    shardstate.shard(source, target, tp=1, layout="rules")
    files = sorted(target.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    expected = load(target, rank=0)
    goals = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
    spans = [Span(os.fspath(file), 0, file.stat().st_size) for file in files]
    memory = touched(room_for(spans))
    raw = {f"raw {setting}": partial(read_spans, spans, setting, memory) for setting in SWEEP}
    through = {name: way for name, way in raw.items() if "buffered" in name}
    some = {str(name): way for name, way in raw.items() if " 1 MiB" in name or " 4 MiB" in name}
    some = {name: way for name, way in some.items() if any(f" {n} ×" in name for n in (2, 8, 16))}
    loading = {"shardstate": lambda: load_model(goals, target)}
    loading |= {name: partial(peer, files, copy_into(goals)) for name, peer in PEERS.items()}

    def compared(name: str) -> None:
        if name in loading:
            for key, tensor in expected.items():
                if not torch.equal(tensor.view(torch.int16), goals[key].view(torch.int16)):
                    raise SystemExit(f"{name}: {key} differs")
                goals[key].fill_(1)

    states = {
        "warm": (warm, loading | through),
        "cold": (cold, loading | raw),
        "half": (half, {"shardstate": loading["shardstate"], **some}),
    }
    result = {"bench": "load", "bytes": nbytes, "rounds": arguments.rounds, "states": {}}
    for state in arguments.state:
        prepare, ways = states[state]
        seconds = take_turns(
            ways, before=partial(prepare, files), rounds=arguments.rounds, after=compared
        )
        own = statistics.median(seconds["shardstate"])
        groups = {
            "raw": [name for name in ways if name.startswith("raw ")],
            "raw direct": [name for name in ways if name.startswith("raw direct")],
            "raw buffered": [name for name in ways if name.startswith("raw buffered")],
            "peer": [name for name in ways if name in PEERS],
        }
        best = {group: best_of(seconds, names) for group, names in groups.items() if names}
        result["states"][state] = {
            "gbps": {
                name: figures([nbytes / 1e9 / value for value in values])
                for name, values in seconds.items()
            },
            "best": {group: name for group, (name, _) in best.items()},
            "ratio_to_best": {group: round(took / own, 3) for group, (_, took) in best.items()},
        }
    result["machine"] = machine()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
