"""How long does it take, and how much memory, to plan a rank of a huge model by recording vLLM?

Rank 0 of 8 of Qwen3-235B-A22B: 36,945 tensors, 470 GB, in sparse files, of which only headers are
read. Each round is a process of its own: `shardstate plan --layout vllm --json`. Importing vLLM is
a phase of its own. `peak_bytes` is the most resident memory of the process, vLLM included. Prints
one JSON line; figures are medians.

Run it where vLLM is installed, with VLLM_CPU_KVCACHE_SPACE=1:

    python bench/record.py [--rounds 5] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from catalog import make


def measured(path: Path) -> tuple[dict[str, object], int]:
    """Return the report of one plan and the peak memory of its process, bytes."""
    command = [sys.executable, "-m", "shardstate", "plan", path, "--tp", "8", "--rank", "0"]
    read, write = os.pipe()
    child = subprocess.Popen(
        [*command, "--layout", "vllm", "--json", "--quiet"], stdout=write, text=True
    )
    os.close(write)
    with open(read) as output:
        text = output.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"plan ended with status {child.returncode}: {text}")
    return json.loads(text), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    path = arguments.work / "catalog-470GB-sparse"
    tensors = make(path)
    phases: list[dict[str, float]] = []
    peaks = []
    report: dict[str, object] = {}
    for _ in range(arguments.rounds):
        report, peak = measured(path)
        phases.append(report["phases"])  # type: ignore[arg-type]
        peaks.append(peak)
    result = {
        "bench": "record",
        "tensors": tensors,
        "bytes": report["bytes"],
        "bytes_wanted": report["bytes_wanted"],
        "materialised": report["materialised"],
        "rounds": arguments.rounds,
        "seconds": {
            name: round(statistics.median(each[name] for each in phases), 2) for name in phases[0]
        },
        "plan_seconds_max": round(max(each["plan"] for each in phases), 2),
        "peak_bytes": max(peaks),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
