"""How long does it take to open a huge checkpoint? 36,945 tensors in 118 files, 470 GB, sparse.

Only headers are read, so that sparse files serve. Prints one JSON line; seconds are medians.

    python bench/catalog.py [--rounds 5] [--work bench/out]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import shardstate
from shardstate.header import serialise_header

FILES, LAYERS, EXPERTS = 118, 94, 128
_ATTENTION = {
    "self_attn.q_proj.weight": (8192, 4096),
    "self_attn.k_proj.weight": (512, 4096),
    "self_attn.v_proj.weight": (512, 4096),
    "self_attn.o_proj.weight": (4096, 8192),
    "self_attn.q_norm.weight": (128,),
    "self_attn.k_norm.weight": (128,),
    "input_layernorm.weight": (4096,),
    "post_attention_layernorm.weight": (4096,),
    "mlp.gate.weight": (128, 4096),
}
_EXPERT = {
    "gate_proj.weight": (1536, 4096),
    "up_proj.weight": (1536, 4096),
    "down_proj.weight": (4096, 1536),
}

_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make(path: Path) -> int:
    """Write sparse files with the names and shapes of Qwen3-235B-A22B; return the tensors."""
    tensors = {"model.embed_tokens.weight": (151936, 4096)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}": shape for name, shape in _ATTENTION.items()}
        for expert in range(EXPERTS):
            for name, shape in _EXPERT.items():
                tensors[f"{prefix}.mlp.experts.{expert}.{name}"] = shape
    tensors |= {"model.norm.weight": (4096,), "lm_head.weight": (151936, 4096)}
    path.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(FILES):
        own = names[number * len(names) // FILES : (number + 1) * len(names) // FILES]
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        weight_map |= dict.fromkeys(own, file)
        rows = []
        for name in own:
            nbytes = 2
            for size in tensors[name]:
                nbytes *= size
            rows.append((name, "BF16", tensors[name], nbytes))
        header = serialise_header(rows, metadata={"format": "pt"}, align=8)
        (path / file).write_bytes(header)
        os.truncate(path / file, len(header) + sum(row[3] for row in rows))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(_CONFIG))
    return len(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench/out"))
    arguments = parser.parse_args()
    path = arguments.work / "catalog-470GB-sparse"
    tensors = make(path)
    seconds, inspected = [], []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        with shardstate.open(path) as checkpoint:
            assert checkpoint.catalog is not None
            assert len(checkpoint.catalog) == tensors
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        shardstate.inspect(path)
        inspected.append(time.perf_counter() - began)
    result = {
        "bench": "catalog",
        "tensors": tensors,
        "files": FILES,
        "open_seconds": round(statistics.median(seconds), 3),
        "open_seconds_max": round(max(seconds), 3),
        "inspect_seconds": round(statistics.median(inspected), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
