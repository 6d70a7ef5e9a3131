"""Writes docs/benchmarks.md and its pictures from the JSON lines that the other scripts printed.

python bench/report.py [--results bench/out/results] [--docs docs]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardstate.plot import Bar, bars_svg

Result = Mapping[str, Any]
STATES = {"warm": "Warm", "cold": "Cold", "half": "Every other 32 MiB cached"}
_MANY = 6  # raw settings in a table: the best of them


def cell(figure: Mapping[str, float]) -> str:
    return f"{figure['median']:.3g} [{figure['min']:.3g}–{figure['max']:.3g}]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def apart(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether the rounds of two ways do not overlap."""
    return a["min"] > b["max"] or b["min"] > a["max"]


def versus(own: Mapping[str, float], other: Mapping[str, float], *, seconds: bool) -> str:
    """Return the ratio of medians, above 1 where `own` is better, and whether it is a result."""
    a, b = own["median"], other["median"]
    ratio = b / a if seconds else a / b
    return f"{ratio:.2f}{'' if apart(own, other) else ' (within the spread)'}"


def bar(name: str, figure: Mapping[str, float]) -> Bar:
    return Bar(name, figure["median"], figure["min"], figure["max"], name == "shardstate")


def shown_of(gbps: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return all that load tensors, and the best raw settings."""
    raw = sorted((n for n in gbps if n.startswith("raw ")), key=lambda n: -gbps[n]["median"])
    return [n for n in gbps if not n.startswith("raw ")] + raw[:_MANY]


def load(result: Result) -> list[str]:
    lines = [
        f"One rank of {result['bytes'] / 1e9:.2f} GB, bfloat16, one file, into parameters that were"
        f" written before; {result['rounds']} rounds. GB/s.",
        "Raw reads are a sweep of 30 settings (15 when warm); the best is chosen on half of the"
        " rounds and compared on the others.",
        "",
    ]
    for state, found in result["states"].items():
        gbps, shown = found["gbps"], shown_of(found["gbps"])
        own = gbps["shardstate"]
        lines += table(
            (STATES[state], "GB/s", "shardstate is … times as fast"),
            (
                (n, cell(gbps[n]), "" if n == "shardstate" else versus(own, gbps[n], seconds=False))
                for n in shown
            ),
        )
        ratios = ", ".join(
            f"{ratio:.2f} of the best {group} ({found['best'][group].removeprefix('raw ')})"
            for group, ratio in found["ratio_to_best"].items()
        )
        lines += [f"On the other half of the rounds: {ratios}.", ""]
    return lines


def load_picture(result: Result) -> str:
    groups = [
        (STATES[state], [bar(n, found["gbps"][n]) for n in shown_of(found["gbps"])])
        for state, found in result["states"].items()
    ]
    return bars_svg(groups, unit="GB/s")


def ordinary(result: Result) -> list[str]:
    def rows(seconds: Result) -> Iterator[tuple[str, str, str]]:
        own = seconds["shardstate"]
        for name, each in seconds.items():
            yield name, cell(each), "" if name == "shardstate" else versus(own, each, seconds=True)

    return [
        f"Rank 0 of {result['tp']} of {result['file_bytes'] / 1e9:.2f} GB;"
        f" {result['rounds']} rounds. The rank wants {result['bytes_wanted'] / 1e9:.3f} GB, which"
        f" lie in {result['pages'] / 1e9:.3f} GB of pages; {result['bytes_read'] / 1e9:.3f} GB are"
        f" read. The peers but `get_slice` read everything.",
        "",
        *table(("Cold", "seconds", "shardstate is … times as fast"), rows(result["seconds"])),
        f"The pages by the best raw throughput of the run ({result['best_raw']},"
        f" {result['best_raw_gbps']} GB/s) would take {result['limit_seconds']} s:"
        f" shardstate reaches {result['share_of_limit']} of that."
        f" Raw reads of the very ranges that it reads take {cell(result['ranges_seconds'])} s"
        f" ({result['best_ranges'].removeprefix('ranges ')}): {result['share_of_ranges']} of that"
        f" on the other half of the rounds. The pages alone, which the kernel is asked for by"
        f" lists, take {cell(result['pages_seconds'])} s to come.",
        "",
        *table(("Warm", "seconds", "shardstate is … times as fast"), rows(result["warm_seconds"])),
    ]


def ordinary_picture(result: Result) -> str:
    bars = [bar(name, seconds) for name, seconds in result["seconds"].items()]
    return bars_svg([(f"rank 0 of {result['tp']}, cold", bars)], unit="s")


def ranks(result: Result) -> list[str]:
    seconds, read = result["seconds"], result["read"]
    own = seconds["shardstate"]
    return [
        f"{result['ranks']} processes load their ranks of one ordinary checkpoint of"
        f" {result['file_bytes'] / 1e9:.2f} GB, cold, all at once; {result['rounds']} rounds."
        " “Read” is what the disk delivered, by the size of the files.",
        "",
        *table(
            ("", "seconds", "shardstate is … times as fast", "read"),
            (
                (
                    n,
                    cell(s),
                    "" if n == "shardstate" else versus(own, s, seconds=True),
                    cell(read[n]),
                )
                for n, s in seconds.items()
            ),
        ),
    ]


def shard(result: Result) -> list[str]:
    best = result["best_raw_write"]
    gbps = result["raw_write_gbps"]
    raw = sorted(gbps, key=lambda name: -gbps[name])[:_MANY]
    phases = ", ".join(f"{name} {value} s" for name, value in result["phases_of_the_last"].items())
    return [
        f"A llama of {result['bytes'] / 1e9:.2f} GB for {result['tp']} ranks, layout"
        f" {result['layout']}, source in the page cache; {result['rounds']} rounds. Digests of every"
        " byte, records and provenance included; all end with fsync.",
        "",
        *table(
            ("", "seconds", "GB/s"),
            (
                ("`cp` + fsync", cell(result["cp_fsync_seconds"]), str(result["cp_gbps"])),
                (
                    "`shard`, `phases.write`",
                    cell(result["shard_write_seconds"]),
                    str(result["shard_write_gbps"]),
                ),
                ("`shard`, all", cell(result["shard_all_seconds"]), ""),
                *((f"raw {name}", "", str(gbps[name])) for name in raw),
            ),
        ),
        f"{result['ratio']} times as fast as `cp` (by round: {', '.join(map(str, result['ratio_by_round']))})"
        + (
            f"; {result['ratio_to_best_raw_write']} of the best raw write ({best})."
            if best
            else "."
        ),
        f"Phases of the last round: {phases}."
        f" Memory beyond the plan: {result['peak_extra_bytes'] / 1e6:.0f} MB.",
        "",
    ]


def module(result: Result) -> list[str]:
    save, verified = result["save"]["seconds"], result["load_verified"]["seconds"]
    own = save["shardstate"]
    return [
        f"{result['bytes'] / 1e9:.2f} GB of parameters; {result['rounds']} rounds.",
        "",
        *table(
            ("save", "seconds", "shardstate is … times as fast"),
            (
                (n, cell(s), "" if n == "shardstate" else versus(own, s, seconds=True))
                for n, s in save.items()
            ),
        ),
        *table(("load of the set, warm", "seconds"), ((n, cell(s)) for n, s in verified.items())),
        f"Memory beyond the model while saving:"
        f" {result['save_peak_extra_bytes'] / 1e6:.0f} MB. `load(map=True)` opens it in"
        f" {result['map_open_seconds']['median'] * 1000:.0f} ms.",
        "",
    ]


def verify(result: Result) -> list[str]:
    lines = [
        f"{result['bytes'] / 1e9:.2f} GB in one rank file; {result['rounds']} rounds. The loop is"
        f" two threads, each of which reads 4 MiB and hashes it.",
        "",
    ]
    for state, found in result["states"].items():
        ratio = found["ratio"]
        lines += table(
            (state.capitalize(), "seconds", "times as fast as the loop"),
            ((n, cell(s), str(ratio.get(n, ""))) for n, s in found["seconds"].items()),
        )
    return lines


def catalog(result: Result) -> list[str]:
    return [
        f"{result['tensors']:,} tensors in {result['files']} files, 470 GB (sparse: only headers are"
        f" read): `open` {result['open_seconds']} s (at most {result['open_seconds_max']}),"
        f" `inspect` {result['inspect_seconds']} s.",
        "",
    ]


def record(result: Result) -> list[str]:
    seconds = ", ".join(f"{name} {value} s" for name, value in result["seconds"].items())
    return [
        f"One rank of 8 of the shapes of Qwen3-235B-A22B ({result['tensors']:,} tensors, 470 GB,"
        f" sparse), planned by running vLLM's own loading code on tensors without bytes;"
        f" {result['rounds']} rounds, a process each: {seconds} (planning at most"
        f" {result['plan_seconds_max']} s). {result['peak_bytes'] / 2**30:.2f} GiB of memory in all,"
        f" vLLM included; {result['materialised']} tensors had to be read.",
        "",
    ]


def weights(result: Result) -> list[str]:
    seconds = result["seconds"]
    return [
        f"`load_weights` of one vLLM worker, rank 0 of 2 ({result['bytes'] / 1e9:.2f} GB), from an"
        f" ordinary checkpoint in the page cache, into parameters that were written before;"
        f" {result['rounds']} rounds. “caching” leaves its shard behind, written in the background.",
        "",
        *table(
            ("", "seconds", "times as fast as vLLM's own"),
            ((n, cell(s), str(result["times_vllm"][n])) for n, s in seconds.items()),
        ),
        f"Leaving a cache behind costs {result['cache_cost']:+.1%} of the weight phase (by round: "
        f"{', '.join(f'{value:+.1%}' for value in result['cache_cost_by_round'])}).",
        "",
    ]


def enginesave(result: Result) -> list[str]:
    seconds, peak, saved = result["seconds"], result["peak_gb"], result["saved"]
    own, wanted = seconds["shardstate"], saved["shardstate"]["tensors"]
    return [
        f"Files of {result['tp']} ranks for vLLM from a llama of {result['bytes'] / 1e9:.2f} GB in"
        f" the page cache; {result['rounds']} rounds, each a process of its own from start to end,"
        " imports included: `shardstate shard --layout vllm`, and an engine of vLLM that is started"
        " to call its `save_sharded_state`. shardstate ends with fsync and has written digests;"
        " vLLM leaves its files in the page cache. “Memory” is the most of all processes at once.",
        "",
        *table(
            ("", "seconds", "shardstate is … times as fast", "memory, GB", "tensors saved"),
            (
                (
                    n,
                    cell(s),
                    "" if n == "shardstate" else versus(own, s, seconds=True),
                    cell(peak[n]),
                    f"{saved[n]['equal']} of {wanted}",
                )
                for n, s in seconds.items()
            ),
        ),
        "“Tensors saved” are equal to shardstate's bit for bit. On a CPU vLLM packs the weights of"
        " linear layers once loaded, and its save lacks what it packed; “weights kept” is with"
        " `ONEDNN_MAX_CPU_ISA=AVX2`, with which it does not pack.",
        "",
    ]


def of_seconds(seconds: Mapping[str, list[float]], nbytes: int) -> list[str]:
    """Return a table of ways to get so many bytes out of a store."""
    figures = {
        n: {"median": statistics.median(v), "min": min(v), "max": max(v)}
        for n, v in seconds.items()
    }
    own = figures["shardstate"]
    return table(
        ("", "seconds", "GB/s", "shardstate is … times as fast"),
        (
            (
                n,
                cell(s),
                f"{nbytes / s['median'] / 1e9:.2f}",
                "" if n in ("shardstate", "reading alone") else versus(own, s, seconds=True),
            )
            for n, s in figures.items()
        ),
    )


def stores(result: Result) -> list[str]:
    return [
        f"A rank of {result['bytes'] / 1e6:.0f} MB from SeaweedFS's S3 server on loopback, which"
        f" shares the two cores, into memory that was written before; {result['rounds']} rounds."
        " “Reading alone” is shardstate without opening and planning. Raw GETs drop what they"
        " get; those with “If-Match, kept” name the version of the object, as each load must,"
        " and copy what comes to its place.",
        "",
        *of_seconds(result["seconds"], result["bytes"]),
        f"{result['times_raw']} of the best raw GETs, reading alone"
        f" {result['reading_times_raw']}; of those that keep what they get"
        f" {result['reading_times_kept']}. {result['times_runai']} times runai-model-streamer.",
        "",
    ]


def farstore(result: Result) -> list[str]:
    return [
        f"A rank of {result['bytes'] / 1e9:.2f} GB from a web server on loopback that waits 40 ms"
        " before each answer and sends it at 90 MB/s; each load is a process that knows nothing"
        f" of it; {result['rounds']} rounds. Opening, where each file's size is asked for, and"
        " planning are included; raw GETs need neither.",
        "",
        *of_seconds(result["seconds"], result["bytes"]),
    ]


def startup(result: Result) -> list[str]:
    parts = (f"{k}: {v}" for k, v in result.items() if k not in ("bench", "machine", "rounds"))
    return [f"Seconds: {'; '.join(parts)}.", ""]


SECTIONS: tuple[tuple[str, str, Callable[[Result], list[str]]], ...] = (
    ("load", "Loading a sharded rank", load),
    ("ordinary", "A rank of an ordinary checkpoint", ordinary),
    ("ranks", "Four ranks at once", ranks),
    ("weights", "The weight phase of a vLLM worker", weights),
    ("shard", "Sharding", shard),
    ("shard-vllm", "Sharding for vLLM", shard),
    ("enginesave", "Sharding with and without an engine", enginesave),
    ("module", "Saving a module, and verifying while loading", module),
    ("verify", "Verifying", verify),
    ("catalog", "Opening a huge checkpoint", catalog),
    ("record", "Planning a huge model for vLLM", record),
    ("startup", "Starting", startup),
    ("stores", "A rank from an S3 server nearby", stores),
    ("farstore", "A rank from a store far away", farstore),
)

PICTURES: Mapping[str, Callable[[Result], str]] = {
    "load": load_picture,
    "ordinary": ordinary_picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("bench/out/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    pictures = arguments.docs / "plots"
    pictures.mkdir(exist_ok=True)

    found = {
        name: json.loads(file.read_text())
        for name, *_ in SECTIONS
        if (file := arguments.results / f"{name}.json").exists() and file.stat().st_size
    }
    machine = next((r["machine"] for r in found.values() if "machine" in r), "")
    left_out = [name for name, *_ in SECTIONS if name not in found]
    today = datetime.now(UTC).date().isoformat()
    lines = [
        "# Benchmarks",
        "",
        f"Written by `bench/report.py` (`make bench` runs all scripts, then that) on {today}: {machine}, no GPU, a virtual disk with ext4.",
        "Each section is one run of the script named there, with all peers in that run; rounds are"
        " interleaved, and the order rotates.",
        "Figures are medians, with lowest and highest in brackets; a ratio whose rounds overlap is"
        " marked, and is no win.",
        "Times on shared machines drift from run to run: compare within a section only.",
        *([f"Not run this time: {', '.join(left_out)}."] if left_out else []),
        "Cold and warm are proven by residency before each run, and results compared bit for bit.",
        "",
    ]
    for name, title, section in SECTIONS:
        if name in found:
            script = name.split("-")[0]
            lines += [f"## {title} (`bench/{script}.py`)", "", *section(found[name])]
            if name in PICTURES:
                svg = PICTURES[name](found[name])
                (pictures / f"{name}.svg").write_text(svg, encoding="utf-8")
                lines += [f"![{title}](plots/{name}.svg)", ""]
    (arguments.docs / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
