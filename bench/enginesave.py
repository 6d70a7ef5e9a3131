"""How long until there are files of each rank for vLLM: `shardstate shard`, or an engine's save?

Two ranks of a llama of 2.2 GB, in the page cache. Both ways are a process of their own, timed from
its start to its end, imports included: `shardstate shard --layout vllm --tp 2`, and what vLLM's
example does, an `LLM` of two ranks whose `save_sharded_state` is called; it gets next to no memory
for keys and values, which it would not use. shardstate ends with fsync and has written digests;
vLLM leaves its files in the page cache.

Once loaded, a CPU engine packs the weights of linear layers for oneDNN and empties its parameters:
what it saves lacks them. With ONEDNN_MAX_CPU_ISA=AVX2 oneDNN refuses bfloat16, and vLLM keeps the
parameters as they were loaded: that is “vllm, weights kept”, the one to compare with.

`peak_gb` is the most memory of a process and all its descendants at once: RssAnon and RssShmem,
every 50 ms; what forked processes share counts for each. Each set of shardstate's is verified
against its source, and `equal` is how many of its tensors vLLM saved bit for bit, by rank and name.
Rounds are interleaved, in rotating order; figures are medians. Prints one JSON line.

Run it where vLLM is installed:

    python bench/enginesave.py [--rounds 5] [--work bench/out]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import deserialize

import shardstate
from checkpoint import make_llama
from residency import warm
from rounds import figures, machine, take_turns

TP = 2
SAVE = f"""
import os, shutil, sys
from vllm import LLM
source, target = sys.argv[1:]
llm = LLM(source, tensor_parallel_size={TP}, skip_tokenizer_init=True, dtype="bfloat16",
          enforce_eager=True, max_model_len=128, num_gpu_blocks_override=8,
          distributed_executor_backend="mp")
os.mkdir(target)
llm.llm_engine.engine_core.save_sharded_state(path=target, pattern=None, max_size=5 * 1024**3)
shutil.copy(os.path.join(source, "config.json"), target)
"""
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def memory(pids: set[int]) -> int:
    """Return the bytes of processes and of their descendants, which `pids` learns of."""
    total, left = 0, list(pids)
    while left:
        process = Path(f"/proc/{left.pop()}")
        try:
            status = dict(
                line.split(":", 1) for line in (process / "status").read_text().splitlines()
            )
            total += sum(
                1024 * int(status[key].split()[0])
                for key in ("RssAnon", "RssShmem")
                if key in status  # a zombie has none
            )
            for thread in (process / "task").iterdir():
                new = {int(pid) for pid in (thread / "children").read_text().split()} - pids
                pids |= new
                left += new
        except OSError:  # ended meanwhile
            continue
    return total


def run(command: list[object], environment: Mapping[str, str], log: Path, peaks: list[int]) -> None:
    """Run a command to its end, and note its peak memory."""
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [str(each) for each in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENGINE, **environment},
        )
    pids, peak = {child.pid}, 0
    while child.returncode is None:
        peak = max(peak, memory(pids))
        try:
            child.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    if child.returncode:
        raise SystemExit(f"{command[:4]} ended with {child.returncode}: {log.read_text()[-4000:]}")
    peaks.append(peak)


def contents(folder: Path) -> dict[tuple[int, str], tuple[object, ...]]:
    """Return dtype, shape, size and digest of each tensor, by rank and name."""
    found = {}
    for rank in range(TP):
        files = sorted(folder.glob(f"model-rank-{rank}-part-*.safetensors"))
        if not files:
            raise SystemExit(f"{folder} has no file of rank {rank}")
        for file in files:
            for name, tensor in deserialize(file.read_bytes()):
                data = tensor["data"]
                digest = hashlib.sha256(data).digest()
                found[rank, name] = (tensor["dtype"], *tensor["shape"], len(data), digest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    source, target = arguments.work / "llama-2.2GB", arguments.work / "enginesave"
    if not (source / "config.json").exists():
        make_llama(source, nbytes=2_200_000_000, files=4)
    shutil.rmtree(target, ignore_errors=True)
    sources = sorted(source.glob("*.safetensors"))
    own = [sys.executable, "-m", "shardstate", "shard", source, target, "--tp", TP]
    engine = [sys.executable, "-c", SAVE, source, target]
    commands = {
        "shardstate": ([*own, "--layout", "vllm"], {}),
        "vllm": (engine, {}),
        "vllm, weights kept": (engine, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    }
    peaks: dict[str, list[int]] = {name: [] for name in commands}
    log = arguments.work / "enginesave.log"
    expected: dict[tuple[int, str], tuple[object, ...]] = {}
    saved: dict[str, dict[str, int]] = {}

    def before() -> None:
        os.sync()
        warm(sources)

    def checked(name: str) -> None:
        if name == "shardstate" and (found := shardstate.verify(target, against=source).problems):
            raise SystemExit(f"shardstate: {found}")
        found = contents(target)
        expected.update({} if expected else found)  # shardstate's: its turn is the first
        saved[name] = {
            "tensors": len(found),
            "bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
            "equal": sum(found.get(key) == value for key, value in expected.items()),
        }
        shutil.rmtree(target)

    seconds = take_turns(
        {
            name: partial(run, command, environment, log, peaks[name])
            for name, (command, environment) in commands.items()
        },
        before=before,
        rounds=arguments.rounds,
        after=checked,
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "bench": "enginesave",
        "bytes": sum(file.stat().st_size for file in sources),
        "tp": TP,
        "rounds": arguments.rounds,
        "seconds": {name: figures(values, 2) for name, values in seconds.items()},
        "times_shardstate": {
            name: round(median / medians["shardstate"], 2) for name, median in medians.items()
        },
        "peak_gb": {
            name: figures([peak / 1e9 for peak in values[-arguments.rounds :]], 2)
            for name, values in peaks.items()
        },
        "saved": saved,
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
