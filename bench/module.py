"""How fast do 2 GB get into the parameters of a module, and out of them?

Load: beside `safe_open` + `copy_` (as in vLLM) and `load_file` + `copy_`, warm and cold, into
parameters that were written before: touching memory for the first time is slow here, and no part of
reading. Residency is proven by mincore. Save: beside `safetensors.torch.save_file` + fsync of the
same tensors. Rounds are interleaved, in rotating order; figures are medians of seconds; the last
round is compared bit for bit. Prints one JSON line; ratios above 1 say that shardstate is faster.

    python bench/module.py [--rounds 5] [--work bench/out] [--save-only]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from residency import cold, warm
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


def figures(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(
    ways: dict[str, Callable[[], object]], before: Callable[[], object], rounds: int
) -> dict:
    """Time each way in turn, `rounds` times after one that counts for nobody."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        names = list(ways)
        # A disk that was just written to is slower: each way comes after each other one in turn.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            run = ways[name]
            before()
            elapsed = timed(run)
            if number:
                seconds[name].append(elapsed)
    own = statistics.median(seconds["shardstate"])
    return {
        "seconds": {name: figures(values) for name, values in seconds.items()},
        "ratio": {
            name: round(statistics.median(values) / own, 2)
            for name, values in seconds.items()
            if name != "shardstate"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    parser.add_argument("--save-only", action="store_true")
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

    saving = compare({"save_file + fsync": plain_save, "shardstate": save}, clear, arguments.rounds)
    if arguments.save_only:
        shutil.rmtree(directory)
        print(json.dumps({"bench": "module", "save": saving, "save_peak_extra_bytes": max(peaks)}))
        return
    clear()
    save()
    files = sorted((directory / "set").glob("*.safetensors"))

    def by_safe_open() -> None:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    goal[name].copy_(opened.get_tensor(name))

    def by_load_file() -> None:
        for file in files:
            for name, tensor in load_file(file).items():
                goal[name].copy_(tensor)

    ways = {
        "safe_open + copy_": by_safe_open,
        "load_file + copy_": by_load_file,
        "shardstate": lambda: load_model(goal, directory / "set"),
    }
    loading = {
        "warm": compare(ways, lambda: warm(files), arguments.rounds),
        "cold": compare(ways, lambda: cold(files), arguments.rounds),
    }
    verified = compare(
        {
            "shardstate": lambda: load_model(goal, directory / "set"),
            "shardstate, verify": lambda: load_model(goal, directory / "set", verify=True),
        },
        lambda: warm(files),
        arguments.rounds,
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
        "save": saving,
        "save_peak_extra_bytes": max(peaks),
        "load": loading,
        "load_verified": verified,
        "map_open_seconds": figures(opening),
        "wrong_tensors": len(wrong),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
