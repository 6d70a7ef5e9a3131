"""Reports as people read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardstate.report import Report

_OVERREAD = 1.05  # beyond this, say why more is read than wanted


def print_report(command: str, arguments: Mapping[str, Any], report: Report) -> None:
    """Print what `command` returned."""
    # Rendered first: rich would turn a broken pipe into exit status 1, which means damage here.
    # Names are cut at the width of a terminal only; whoever reads a pipe wants them whole.
    width = None if sys.stdout.isatty() else 10_000
    console = Console(highlight=False, soft_wrap=True, width=width)
    with console.capture() as capture:
        _render(console, command, arguments, report)
    click.echo(capture.get(), nl=False)


def _render(console: Console, command: str, arguments: Mapping[str, Any], report: Report) -> None:
    {
        "inspect": _inspect,
        "plan": _plan,
        "shard": _shard,
        "load": _load,
        "verify": _verify,
        "copy": _copy,
        "bench": _bench,
        "sign": _sign,
        "list": _cache,
        "prune": _cache,
    }[command](console, arguments, report)
    for note in report.notes or ():
        console.print(f"note: {escape(note)}")


def size(nbytes: float | None) -> str:
    """Return bytes in decimal units, as disks and links are sold."""
    if nbytes is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def count(number: int | None, noun: str) -> str:
    """Return a number with its noun, in the plural where that is right."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _headline(report: Report) -> str:
    kinds = {
        "checkpoint": "ordinary checkpoint",
        "vllm": "sharded set of vLLM's own (nothing vouches for its bytes)",
    }
    text = kinds.get(report.kind or "", "")
    if report.kind == "shardstate":
        state = "committed" if report.committed else "NOT committed: some ranks are missing"
        text = f"sharded set, {state}"
    if report.topology:
        text += f"; tp {report.topology['tp']}"
    for name in ("layout", "stage"):
        if value := getattr(report, name):
            text += f", {name} {value}"
    return text


def _inspect(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    console.print(f"[bold]{escape(str(arguments['path']))}[/bold]: {_headline(report)}")
    if report.set:
        console.print(f"set {report.set}")
    if report.digest:
        console.print(f"digest {report.digest}")
    console.print(
        f"{count(report.tensors, 'tensor')}, {size(report.bytes)} in {count(report.files, 'file')}"
        + (f", {size(report.padding_bytes)} of it padding" if report.padding_bytes else "")
    )
    console.print()
    table = _table("dtype", "bytes", "")
    for dtype, nbytes in (report.bytes_by_dtype or {}).items():
        table.add_row(dtype, size(nbytes), f"{nbytes / max(1, report.bytes or 1):.1%}")
    console.print(table)
    if report.bytes_by_rank:
        console.print()
        files = [f["rank"] for f in report.file_list or ()]
        table = _table("rank", "bytes", "files")
        for rank, nbytes in report.bytes_by_rank.items():
            table.add_row(rank, size(nbytes), str(files.count(int(rank))))
        console.print(table)
    if report.tensor_list is not None:
        console.print()
        _tensors(console, report.tensor_list)


def _tensors(console: Console, tensors: Sequence[Mapping[str, Any]]) -> None:
    table = _table("tensor", "dtype", "shape", "bytes", "file")
    for tensor in tensors:
        table.add_row(
            escape(tensor["name"]),
            tensor["dtype"],
            escape(str(list(tensor["shape"]))),
            size(tensor["end"] - tensor["begin"]),
            escape(tensor["file"]),
        )
    console.print(table)


def _rules(console: Console, report: Report) -> None:
    if report.by_rule:
        console.print()
        table = _table("how a rank is made", "tensors", "bytes")
        for row in report.by_rule:
            table.add_row(row["rule"], str(row["tensors"]), size(row["bytes"]))
        console.print(table)


def _plan(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    assert report.ranks is not None
    assert report.topology is not None
    source = escape(str(arguments["src"]))
    console.print(
        f"[bold]{source}[/bold]: rank {report.ranks[0]} of {report.topology['tp']}, "
        f"layout {report.layout or 'rules'}"
    )
    console.print(f"makes  {size(report.bytes)} in {count(report.tensors, 'tensor')}")
    console.print(f"wants  {size(report.bytes_wanted)} of what is stored")
    console.print(
        f"reads  {size(report.bytes_read)} in {count(report.requests, 'request')} "
        f"from {count(report.files, 'file')}"
    )
    _rules(console, report)
    wanted, read = report.bytes_wanted or 0, report.bytes_read or 0
    if wanted and read > _OVERREAD * wanted:
        console.print(
            f"\nreads {read / wanted:.2f} × what it wants: tensors that are split along an inner "
            f"axis lie in every row, and whole rows are read. Sharded once, each start reads only "
            f"its own bytes: shardstate shard {source} DST --tp {report.topology['tp']}"
        )


def _shard(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    dry = arguments.get("dry_run")
    console.print(
        f"[bold]{escape(str(arguments['dst']))}[/bold]: "
        + ("would be a " if dry else "")
        + f"set for tp {arguments['tp']}, layout {report.layout}, dtype {report.dtype}"
    )
    files = [f["rank"] for f in report.file_list or ()]
    table = _table("rank", "bytes", "files")
    for rank, nbytes in (report.bytes_by_rank or {}).items():
        table.add_row(rank, size(nbytes), str(files.count(int(rank))))
    console.print(table)
    _rules(console, report)
    console.print()
    if dry:
        console.print(f"would read {size(report.bytes_read)} and write {size(report.bytes)}")
        return
    if not report.bytes_written:
        return
    console.print(
        f"read {size(report.bytes_read)}, wrote {size(report.bytes_written)} in "
        f"{_seconds(report, 'write')}: {report.gbps or 0:.2f} GB/s, digests included; "
        f"{size(report.peak_extra_bytes)} of memory"
    )
    console.print("committed" if report.committed else "not committed yet: other ranks are missing")


def _load(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    assert report.ranks is not None
    table = _table("rank", "tensors", "bytes", "wanted", "read", "requests", "seconds", "GB/s")
    table.add_row(
        str(report.ranks[0]),
        str(report.tensors),
        size(report.bytes),
        size(report.bytes_wanted),
        size(report.bytes_read),
        str(report.requests),
        _seconds(report, "read"),
        f"{report.gbps or 0:.2f}",
    )
    console.print(table)
    if arguments.get("verify") or arguments.get("key"):
        console.print("all digests agree")


def _verify(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    path = escape(str(arguments["path"]))
    looked = (
        f"{count(report.files, 'file')}, {count(report.tensors, 'tensor')}, {size(report.bytes)}"
    )
    if report.problems:
        console.print(
            f"[bold red]{path}: {count(len(report.problems), 'problem')}[/bold red] in {looked}; "
            f"{_seconds(report, 'read')}"
        )
        for problem in report.problems:
            where = f" {escape(problem.tensor)}" if problem.tensor else ""
            if problem.begin is not None:
                where += f" \\[{problem.begin}, {problem.end})"
            console.print(
                f"  [bold]{problem.kind}[/bold] {escape(problem.file)}{where}: "
                f"{escape(problem.problem)}"
            )
        return
    if report.kind != "shardstate":
        what = "the structure is sound"
    elif arguments.get("against"):
        what = f"all digests agree, and every byte comes from {escape(str(arguments['against']))}"
    elif arguments.get("full") or arguments.get("repair") is not None:
        what = "all digests agree"
    else:
        what = "files, headers and records agree; --full hashes the data too"
    if arguments.get("key"):
        what += f"; signed by key {report.signed_by}"
    console.print(f"[bold]{path}[/bold]: {what} ({looked}; {_seconds(report, 'read')})")


def _copy(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    whose = ""
    if arguments.get("ranks"):
        whose = f" of rank {', '.join(map(str, report.ranks or ()))}"
    digests = "digests compared" if report.kind == "shardstate" else "no digests are recorded"
    console.print(
        f"[bold]{escape(str(arguments['dst']))}[/bold]: {count(report.files, 'file')}{whose}, "
        f"wrote {size(report.bytes_written)} in {_seconds(report, 'write')}: "
        f"{report.gbps or 0:.2f} GB/s, {digests}"
    )


def _bench(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    console.print(
        f"[bold]{escape(str(arguments['path']))}[/bold]: {size(report.bytes)} in "
        f"{count(report.tensors, 'tensor')}, into memory that was touched before"
    )
    for state in ("warm", "cold", "remote"):
        table = _table(state, "GB/s", "lowest", "highest")
        for each in report.measured or ():
            if each["state"] == state:
                figures = (each[key] for key in ("gbps", "gbps_min", "gbps_max"))
                table.add_row(escape(each["name"]), *(f"{value:.2f}" for value in figures))
        if table.row_count:
            console.print()
            console.print(table)
    console.print()


def _sign(console: Console, arguments: Mapping[str, Any], report: Report) -> None:
    if report.problems:
        _verify(console, arguments, report)
        return
    console.print(
        f"[bold]{escape(str(arguments['path']))}[/bold]: signed by key {report.signed_by}"
    )
    console.print(f"digest {report.digest}")


def _seconds(report: Report, phase: str) -> str:
    return f"{(report.phases or {}).get(phase, 0.0):.3g} s"


def _cache(console: Console, _: Mapping[str, Any], report: Report) -> None:
    table = _table("entry", "bytes", "last used", "ranks")
    for entry in report.file_list or ():
        used = datetime.fromtimestamp(entry["used"]).isoformat(" ", "minutes")
        ranks = "all" if entry["committed"] else "some"
        table.add_row(escape(entry["name"][:16]), size(entry["bytes"]), used, ranks)
    if report.files:
        console.print(table)
    noun = "entry" if report.files == 1 else "entries"
    console.print(f"{report.files} {noun}, {size(report.bytes)}")
