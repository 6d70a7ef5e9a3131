"""How fast are the 2 GB of a module saved, and what do digests cost while they are loaded?

Save: beside `safetensors.torch.save_file` + fsync of the same tensors. Load: with and without
`verify`, warm (proven), into parameters that were written before; beside the peers it is measured
by `load.py`. Rounds are interleaved, in rotating order; figures are medians of seconds; the last
round is compared bit for bit. Prints one JSON line.

    python bench/module.py [--rounds 7] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from residency import warm
from rounds import figures, machine, take_turns, timed
from shardstate.torch import load, load_model, save_model

HIDDEN, MLP, LAYERS, VOCABULARY = 2048, 5632, 20, 32000


def parameters() -> dict[str, torch.Tensor]:
    """Return 2 GB of bfloat16 tensors as a rank of a fused llama has them."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * MLP, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, MLP),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(
            torch.bfloat16
        )
        for name, shape in shapes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    logging.getLogger("shardstate").setLevel(logging.ERROR)
    directory = arguments.work / "module"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    state = parameters()
    goal = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    peaks: list[int] = []

    def save() -> None:
        peaks.append(save_model(state, directory / "set").peak_extra_bytes or 0)

    def plain_save() -> None:
        save_file(state, directory / "plain.safetensors")
        with open(directory / "plain.safetensors", "rb") as opened:
            os.fsync(opened.fileno())

    def clear() -> None:
        shutil.rmtree(directory / "set", ignore_errors=True)
        (directory / "plain.safetensors").unlink(missing_ok=True)
        os.sync()

    saving = take_turns(
        {"save_file + fsync": plain_save, "shardstate": save},
        before=clear,
        rounds=arguments.rounds,
    )
    clear()
    save()
    files = sorted((directory / "set").glob("*.safetensors"))
    verified = take_turns(
        {
            "load_model": lambda: load_model(goal, directory / "set"),
            "load_model, verify": lambda: load_model(goal, directory / "set", verify=True),
        },
        before=lambda: warm(files),
        rounds=arguments.rounds,
    )
    opening = [timed(lambda: load(directory / "set", rank=0, map=True)) for _ in range(6)][1:]
    wrong = [
        name
        for name, tensor in state.items()
        if not torch.equal(tensor.view(torch.int16), goal[name].view(torch.int16))
    ]
    shutil.rmtree(directory)
    result = {
        "bench": "module",
        "bytes": sum(tensor.numel() * 2 for tensor in state.values()),
        "rounds": arguments.rounds,
        "save": {"seconds": {name: figures(values) for name, values in saving.items()}},
        "save_peak_extra_bytes": max(peaks),
        "load_verified": {"seconds": {n: figures(values) for n, values in verified.items()}},
        "map_open_seconds": figures(opening),
        "wrong_tensors": len(wrong),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
