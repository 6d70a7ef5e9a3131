"""How long is the weight phase of one vLLM worker, and what does leaving a cache behind cost it?

Rank 0 of 2 of an ordinary checkpoint, warm: vLLM's own loader, and the load format `shardstate`
recorded, recorded with a cache that is empty, and cached. One model, whose parameters were written
before; the writer of the cache ends, and the cache goes, before the next round. Rounds are
interleaved, in rotating order; figures are medians of seconds of `load_weights`; all results are
compared bit for bit. Prints one JSON line; `cache_cost` is the median of the seconds with an empty
cache by those without, less one.

Run it where vLLM is installed, with VLLM_CPU_KVCACHE_SPACE=1 and VLLM_LOGGING_LEVEL=ERROR:

    python bench/weights.py [--source DIR] [--rounds 9] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from checkpoint import make_llama
from residency import warm
from rounds import figures, machine
from shardstate.vllm.loader import ShardedStateLoader
from shardstate.vllm.parallel import as_worker


def settled() -> None:
    """Wait until a writer of the cache has ended."""
    for thread in threading.enumerate():
        if thread.name == "shardstate-cache":
            thread.join()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; NaN, too."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path)
    # Layers as wide as a 7B model's: what is done once for each tensor counts as it does there.
    parser.add_argument("--bytes", type=int, default=6_600_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, cache = arguments.source, arguments.work / "cache"
    if source is None:
        source = arguments.work / f"llama-{arguments.bytes / 1e9:.1f}GB"
        if not (source / "config.json").exists():
            make_llama(source, nbytes=arguments.bytes, files=4, hidden=4096)
    files = sorted(source.glob("*.safetensors"))
    quiet = {"use_tqdm_on_load": False}
    ours = {"load_format": "shardstate", **quiet}
    ways = {
        "vllm": DefaultModelLoader(LoadConfig(load_format="safetensors", **quiet)),
        "recorded": ShardedStateLoader(LoadConfig(**ours)),
        "caching": ShardedStateLoader(
            LoadConfig(model_loader_extra_config={"cache": str(cache)}, **ours)
        ),
        "cached": ShardedStateLoader(
            LoadConfig(model_loader_extra_config={"cache": str(cache)}, **ours)
        ),
    }
    config = EngineArgs(
        model=str(source), tensor_parallel_size=2, skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=128, distributed_executor_backend="mp",
    ).create_engine_config()  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with as_worker(config, 0):
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        state = model.state_dict()
        expected: dict[str, torch.Tensor] = {}
        for number in range(arguments.rounds + 1):
            names = list(ways)
            if number:  # the first round warms everything, counts for nobody, and is in order
                names = names[number % len(names) :] + names[: number % len(names)]
            for name in names:
                for tensor in state.values():
                    tensor.fill_(1)
                if name == "caching":
                    shutil.rmtree(cache, ignore_errors=True)
                    os.sync()
                elif name == "cached" and not cache.exists():
                    ways["caching"].load_weights(model, config.model_config)
                    settled()
                warm(sorted(cache.rglob("*.safetensors")) if name == "cached" else files)
                # What was removed is freed in the background; the same pause for all of them.
                time.sleep(3)
                began = time.perf_counter()
                ways[name].load_weights(model, config.model_config)
                took = time.perf_counter() - began
                settled()
                if number:
                    seconds[name].append(took)
                if not expected:
                    expected = {key: tensor.clone() for key, tensor in state.items()}
                if wrong := [key for key in state if not same(expected[key], state[key])]:
                    raise SystemExit(f"{name}: {', '.join(wrong)} differ from vLLM's own")
    shutil.rmtree(cache)
    ratio = [b / a - 1 for a, b in zip(seconds["recorded"], seconds["caching"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "bench": "weights",
        "bytes": sum(t.nbytes for t in {t.data_ptr(): t for t in state.values()}.values()),
        "rounds": arguments.rounds,
        "seconds": {name: figures(values, 4) for name, values in seconds.items()},
        "times_vllm": {name: round(medians["vllm"] / medians[name], 2) for name in ways},
        "cache_cost": round(medians["caching"] / medians["recorded"] - 1, 3),
        "cache_cost_by_round": [round(value, 3) for value in ratio],
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
