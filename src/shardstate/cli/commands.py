"""The commands: arguments in, one call of the API, output out."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

import shardstate
from shardstate import api
from shardstate.cli.progress import progress_bar
from shardstate.names import DEFAULT_PATTERN
from shardstate.report import Report

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_DTYPES = click.Choice(["keep", "bf16", "f16", "f32"])


def _ranks(text: str) -> tuple[int, ...]:
    """Return the ranks of a list such as `0,3` or `0-3`."""
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) >= 2**20:
            raise click.BadParameter(f"{text!r} is no list of ranks, such as 0,3")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


@click.group(context_settings=_CONTEXT, no_args_is_help=True)
@click.version_option(shardstate.__version__, prog_name="shardstate")
def cli() -> None:
    """Gets the weights of large models into workers.

    Shards checkpoints by tensor-parallel rank, loads a rank reading only its bytes, and verifies
    what is stored. PATH is a directory, s3://…, gs://…, az://…, https://… or a hub id org/name.

    Exit status: 0 done, 1 damage found, 2 bad usage or input, 3 storage failed, 4 bug, 130 Ctrl-C.
    """


def _common(command: Callable[..., Report]) -> Callable[..., int]:
    """Add the options that every command has, and print the report that it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", is_flag=True, help="Print neither results nor progress.")
    @click.option("--debug", is_flag=True, help="Log more, and show tracebacks.")
    @click.option(
        "--threads", type=click.IntRange(1, 1024), help="Threads that read or write at once."
    )
    @click.option(
        "--direct/--no-direct",
        default=None,
        help="Read local files past the page cache, or through it  [default: what is faster].",
    )
    @click.option(
        "--chunk-bytes",
        metavar="SIZE",
        help="Read no more than that at once: bytes, 1MiB.",
    )
    @click.option(
        "--timeout",
        type=click.FloatRange(min=0.1),
        default=api.TIMEOUT_SECONDS,
        metavar="S",
        show_default=True,
        help="Seconds without a byte from a store until it is an error.",
    )
    @click.option(
        "--store-option",
        "store_options",
        multiple=True,
        metavar="K=V",
        callback=lambda _context, _option, values: _options(values),
        help="Option of an object store, such as endpoint=URL; repeatable.",
    )
    @click.option(
        "--cache",
        "cache_dir",
        metavar="DIR",
        help="Keep what is read from elsewhere in DIR, for the next time.",
    )
    @click.option(
        "--cache-size",
        metavar="SIZE",
        default=api.CACHE_SIZE,
        show_default=True,
        help="What that DIR may hold: bytes, 100GB, 100GiB.",
    )
    @functools.wraps(command)
    def wrapped(
        as_json: bool,
        quiet: bool,
        debug: bool,
        direct: bool | None,
        chunk_bytes: str | None,
        timeout: float,
        store_options: dict[str, str],
        cache_dir: str | None,
        cache_size: str,
        **arguments: Any,
    ) -> int:
        arguments["access"] = api.Access(
            timeout=timeout,
            options=store_options,
            cache=cache_dir,
            cache_bytes=api.parse_size(cache_size),
            reading=api.Reading(
                threads=arguments.get("threads"),
                direct=direct,
                chunk_bytes=None if chunk_bytes is None else api.parse_size(chunk_bytes),
            ),
        )
        level = logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING
        # Our own words alone: what clients of clouds say while they are debugged holds secrets.
        root = max(level, logging.WARNING)
        logging.basicConfig(stream=sys.stderr, level=root, format="%(message)s", force=True)
        logging.getLogger("shardstate").setLevel(level)
        with progress_bar(enabled=not quiet) as progress:
            report = command(progress=progress, **arguments)
        if as_json:
            click.echo(json.dumps(report.json()))
        elif not quiet:
            # Imported here: rich takes as long as everything else together.
            from shardstate.cli import show

            name = click.get_current_context().info_name
            show.print_report(str(name), arguments, report)
        return 1 if report.problems else 0

    return wrapped


def _options(values: Sequence[str]) -> dict[str, str]:
    """Return the options of stores; errors do not show their values, which may be secrets."""
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise click.BadParameter("expected KEY=VALUE")
        found[key] = value
    return found


def _engine_arguments(text: str | None) -> dict[str, Any] | None:
    """Return the JSON object of `--engine-args`."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"{text!r} is no JSON object")
    return found


def _path(name: str = "path") -> Callable[[Any], Any]:
    return click.argument(name, metavar=name.upper())


_rules = click.option("--rules", metavar="FILE", help="Split rules of your own (JSON).")
_layout = click.option(
    "--layout",
    type=click.Choice(["auto", "rules", "vllm"]),
    default="auto",
    show_default=True,
    help="rules: names as in the source, split by rules. vllm: what vLLM's parameters hold. "
    "auto: vllm where it is installed and knows the architecture.",
)
_load_layout = click.option(
    "--layout",
    type=click.Choice(["rules", "vllm"]),
    default="rules",
    show_default=True,
    help="How an ordinary checkpoint is shared.",
)
_pp = click.option(
    "--pp", type=click.IntRange(min=1), metavar="N", default=1, help="Pipeline stages (vllm)."
)
_engine_args = click.option(
    "--engine-args",
    metavar="JSON",
    callback=lambda _context, _option, value: _engine_arguments(value),
    help="vLLM's EngineArgs, such as '{\"enable_expert_parallel\": true}'.",
)
_dtype = click.option(
    "--dtype",
    type=_DTYPES,
    default="keep",
    show_default=True,
    help="Convert every tensor of plain floats.",
)
_key = click.option(
    "--key", metavar="FILE", help="Ed25519 key that must have signed the set (PEM or OpenSSH)."
)
_pattern = click.option(
    "--pattern", metavar="P", help=f"Names of rank files  [default: {DEFAULT_PATTERN}]"
)


@cli.command()
@_path()
@click.option("--tensors", is_flag=True, help="List every tensor.")
@_pattern
@_common
def inspect(**arguments: Any) -> Report:
    """Say what PATH holds: topology, stage, sizes by dtype and rank."""
    del arguments["threads"], arguments["progress"]  # headers are read at once
    return api.inspect(**arguments)


@cli.command()
@_path("src")
@click.option("--tp", type=click.IntRange(min=1), metavar="N", help="Tensor-parallel ranks.")
@_pp
@click.option("--rank", type=click.IntRange(min=0), metavar="R", required=True)
@_layout
@_rules
@_engine_args
@_dtype
@_pattern
@_common
def plan(src: str, **arguments: Any) -> Report:
    """Show what loading one rank of SRC would read, without reading a weight."""
    del arguments["threads"], arguments["progress"]  # nothing is read
    return api.plan(src, **arguments)


@cli.command()
@_path("src")
@_path("dst")
@click.option(
    "--tp", type=click.IntRange(min=1), metavar="N", required=True, help="Tensor-parallel ranks."
)
@_pp
@_layout
@_rules
@_engine_args
@_dtype
@_pattern
@click.option(
    "--max-part-size",
    default=api.MAX_PART_SIZE,
    show_default=True,
    metavar="SIZE",
    help="Tensor bytes in one file; 5GB is 5·10⁹, 5GiB is 5·2³⁰.",
)
@click.option("--ranks", type=_ranks, metavar="R,…", help="Write these ranks only: 0,3 or 0-3.")
@click.option("--force", is_flag=True, help="Replace the set that is there.")
@click.option("--dry-run", is_flag=True, help="Print the planned figures and write nothing.")
@_common
def shard(src: str, dst: str, **arguments: Any) -> Report:
    """Write rank files of SRC into DST, in one pass; an interrupted run goes on where it was."""
    return api.shard(src, dst, **arguments)


@cli.command()
@_path()
@click.option("--rank", type=click.IntRange(min=0), metavar="R", required=True)
@click.option(
    "--tp", type=click.IntRange(min=1), metavar="N", help="Ranks that share an ordinary checkpoint."
)
@_pp
@_load_layout
@_rules
@_engine_args
@_dtype
@_pattern
@click.option("--verify", is_flag=True, help="Compare digests while reading.")
@_key
@_common
def load(path: str, **arguments: Any) -> Report:
    """Read one rank into memory and time it: from a set, or from an ordinary checkpoint."""
    return api.load_rank(path, **arguments)[1]


@cli.command()
@_path()
@click.option("--full", is_flag=True, help="Hash all data too.")
@click.option("--against", metavar="SRC", help="Compare with the source; implies --full.")
@click.option("--ranks", type=_ranks, metavar="R,…", help="Check these ranks only: 0,3 or 0-3.")
@_pattern
@click.option(
    "--repair",
    is_flag=False,
    flag_value="",
    metavar="[SRC]",
    help="Make damaged files again: from SRC, the source or another copy of the set; without SRC "
    "from the source that is recorded. Implies --full.",
)
@_key
@click.option("--digest", metavar="HEX", help="What the manifest's digest must be.")
@_common
def verify(path: str, **arguments: Any) -> Report:
    """Check sizes, names, headers and digests of PATH; list all problems."""
    repair = arguments.pop("repair")
    return api.verify(path, repair=False if repair is None else repair or True, **arguments)


@cli.command()
@_path()
@click.option("--key", metavar="FILE", required=True, help="Private Ed25519 key (PEM or OpenSSH).")
@_common
def sign(path: str, key: str, access: api.Access, **_: Any) -> Report:
    """Sign the set in PATH: its manifest, which covers every file. Data are not hashed."""
    return api.sign(path, key=key, access=access)


@cli.command()
@_path()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--max-size", default="2GB", show_default=True, metavar="SIZE", help="Read no more than that."
)
@click.option("--plot", metavar="FILE.svg", help="Draw the figures.")
@_common
def bench(path: str, **arguments: Any) -> Report:
    """Measure reading PATH here: this engine, safetensors, and the raw limits; warm and cold.

    At a store: this engine, and plain ranged requests. Each way reads --max-size each round.
    """
    return api.bench(path, **arguments)


@cli.command()
@_path("src")
@_path("dst")
@click.option("--ranks", type=_ranks, metavar="R,…", help="Bring these ranks only: 0,3 or 0-3.")
@click.option("--force", is_flag=True, help="Replace another set that is there.")
@_pattern
@_common
def copy(src: str, dst: str, **arguments: Any) -> Report:
    """Copy SRC to DST, verified on the way; what is there and matches is left alone."""
    return api.copy(src, dst, **arguments)


@cli.group()
def cache() -> None:
    """Look after the directory that the vLLM loader keeps shards in (`cache` in its config)."""


@cache.command("list")
@_path("dir")
@_common
def cache_list(dir: str, **_: Any) -> Report:  # noqa: A002
    """List the entries of DIR, the one used last first."""
    return api.cache_list(dir)


@cache.command("prune")
@_path("dir")
@click.option(
    "--max-size", required=True, metavar="SIZE", help="What may stay: bytes, 100GB, 100GiB."
)
@_common
def cache_prune(dir: str, max_size: str, **_: Any) -> Report:  # noqa: A002
    """Remove entries of DIR, the one used longest ago first, until the rest fits."""
    return api.cache_prune(dir, max_size=max_size)
