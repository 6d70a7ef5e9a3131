"""Split an ordinary Hugging Face checkpoint for N ranks and save each, all from one process.

    python examples/save_sharded_state.py MODEL OUT --tp 4 [--rules FILE] [--max-part-size 5GB]

`shardstate shard` does this faster and without torch. This shows `save_model`: whatever holds a
rank's tensors, a module or a plain dict, saves that rank under the id that all ranks share.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

import torch

import shardstate
from shardstate.torch import save_model


def rank_tensors(model: Path, *, rank: int, tp: int, rules: Path | None) -> dict[str, torch.Tensor]:
    """Return what one rank holds of an ordinary checkpoint; only its bytes are read."""
    arrays = shardstate.load(model, rank=rank, tp=tp, rules=rules)
    tensors = {}
    for name, array in arrays.items():
        flat = torch.from_numpy(array.reshape(-1).view("uint8"))
        dtype = getattr(torch, array.dtype.name)
        tensors[name] = flat.view(dtype).view(array.shape)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rules", type=Path, help="split rules, where no built-in table fits")
    parser.add_argument("--max-part-size", default="5GB")
    arguments = parser.parse_args()

    save_id = secrets.token_hex(16)  # new for each generation, the same for all ranks
    for rank in range(arguments.tp):
        tensors = rank_tensors(arguments.model, rank=rank, tp=arguments.tp, rules=arguments.rules)
        report = save_model(
            tensors,
            arguments.out,
            rank=rank,
            tp=arguments.tp,
            save_id=save_id,
            max_part_size=arguments.max_part_size,
        )
        state = "the set is committed" if report.committed else "the set is not committed yet"
        print(
            f"rank {rank}: {report.tensors} tensors, {(report.bytes or 0) / 1e6:.1f} MB "
            f"in {report.files} files, {report.gbps or 0:.2f} GB/s; {state}"
        )


if __name__ == "__main__":
    try:
        main()
    except shardstate.ShardStateError as error:
        sys.exit(f"save_sharded_state: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
