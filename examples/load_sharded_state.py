"""Load one rank of a sharded set into a module's own parameters, and print the report.

    python examples/load_sharded_state.py SET --rank 0 [--verify] [--backend runai]

The module stands for the one that an engine builds: it has the names, shapes and dtypes of the
rank, and memory of its own. `load_model` fills that memory; nothing is allocated or replaced.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

import shardstate
from shardstate.torch import load_model


def module_for(path: Path, *, rank: int) -> torch.nn.Module:
    """Return a module with the parameters of one rank of the set at `path`, all zero."""
    model = torch.nn.Module()
    checkpoint = shardstate.open(path)
    with checkpoint:
        for tensor in checkpoint.rank_catalog(rank):
            *parents, last = tensor.name.split(".")
            module = model
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            zeros = torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
            module.register_parameter(last, torch.nn.Parameter(zeros, requires_grad=False))
    return model


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="compare digests while reading")
    parser.add_argument("--backend", default="native")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = module_for(arguments.path, rank=arguments.rank)
    report = load_model(
        model,
        arguments.path,
        rank=arguments.rank,
        verify=arguments.verify,
        backend=arguments.backend,
    )
    print(f"rank {arguments.rank} of {report.topology}: {report.kind} set {report.set}")
    print(f"{report.tensors} tensors, {(report.bytes or 0) / 1e6:.1f} MB from {report.files} files")
    for phase, seconds in (report.phases or {}).items():
        print(f"  {phase:6} {seconds:.4f} s")
    print(f"  {report.gbps or 0:.2f} GB/s")
    for note in report.notes or ():
        print(f"  note: {note}")


if __name__ == "__main__":
    try:
        main()
    except shardstate.ShardStateError as error:
        sys.exit(f"load_sharded_state: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
