"""How fast is sharding, digests included, beside a plain copy of the same bytes, and raw writes?

All end with fsync. Rounds are interleaved and begin with nothing left to write; the source is in
the page cache for both, as far as memory allows. Prints one JSON line; figures are medians.
`ratio` is the median time of cp by the median `phases.write` of shard: above 1 is faster than cp.
Raw writes are a sweep: threads 1, 2, 4, 8 × through the page cache or past it × pre-allocated or
not, chunks of 4 MiB of as many files; the best is chosen on half of the rounds and compared on the
others; `--no-raw` leaves them out.

    python bench/shard.py [--source DIR] [--tp 8] [--layout rules] [--rounds 5] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import rawwrite
import shardstate
from checkpoint import make_llama
from rounds import best_of, figures, machine


def copy(source: Path, target: Path) -> float:
    """Return the seconds of `cp` and of fsync of what it wrote."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for file in target.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--layout", default="rules", help="vllm: run it where vLLM is installed")
    parser.add_argument("--no-raw", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, target = arguments.source, arguments.work / "target"
    if source is None:
        source = arguments.work / "llama-2.2GB"
        if not (source / "config.json").exists():
            make_llama(source, nbytes=2_200_000_000, files=4)
    copies, writes, totals, extra = [], [], [], []
    raw: dict[str, list[float]] = {str(setting): [] for setting in rawwrite.SWEEP}
    report, block = None, rawwrite.memory()
    for number in range(arguments.rounds + 1):
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        seconds = copy(source, target)
        shutil.rmtree(target)
        os.sync()
        report = shardstate.shard(source, target, tp=arguments.tp, layout=arguments.layout)
        sizes = [-(-each["bytes"] // 4096) * 4096 for each in report.file_list]
        for setting in () if arguments.no_raw else rawwrite.SWEEP:
            os.sync()
            seconds_raw = rawwrite.write_files(arguments.work / "raw", sizes, setting, block)
            if number:
                raw[str(setting)].append(seconds_raw)
        if number:  # the first round warms caches and counts for nobody
            copies.append(seconds)
            writes.append(report.phases["write"])
            totals.append(report.seconds)
            extra.append(report.peak_extra_bytes)
    assert report is not None
    problems = shardstate.verify(target, against=source).problems
    shutil.rmtree(target)
    gigabytes = report.bytes / 1e9
    raw = {name: values for name, values in raw.items() if values}
    best, best_seconds = best_of(raw, list(raw)) if raw else (None, None)
    result = {
        "bench": "shard",
        "bytes": report.bytes,
        "tp": arguments.tp,
        "layout": arguments.layout,
        "rounds": arguments.rounds,
        "cp_fsync_seconds": figures(copies),
        "shard_write_seconds": figures(writes),
        "shard_all_seconds": figures(totals),
        "phases_of_the_last": {k: round(v, 3) for k, v in report.phases.items()},
        "shard_write_gbps": round(gigabytes / statistics.median(writes), 3),
        "cp_gbps": round(gigabytes / statistics.median(copies), 3),
        "ratio": round(statistics.median(copies) / statistics.median(writes), 2),
        "ratio_by_round": [round(c / w, 2) for c, w in zip(copies, writes, strict=True)],
        "raw_write_gbps": {
            name: round(gigabytes / statistics.median(values), 2) for name, values in raw.items()
        },
        "best_raw_write": best,
        "ratio_to_best_raw_write": best_seconds
        and round(best_seconds / statistics.median(writes), 3),
        "peak_extra_bytes": max(extra),
        "problems_against_source": len(problems),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
