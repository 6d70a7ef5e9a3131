"""Makes checkpoints to measure with: llama names and shapes, random bfloat16, no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shardstate.header import serialise_header

VOCABULARY, HEAD, GROUPS = 32000, 64, 4  # heads share a key and a value by fours


def make_llama(path: Path, *, nbytes: int, files: int, hidden: int = 2048) -> int:
    """Write a llama checkpoint of about `nbytes` bytes in `files` files; return its exact size."""
    mlp = hidden // 4 * 11
    layer_shapes = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // GROUPS, hidden),
        "self_attn.v_proj.weight": (hidden // GROUPS, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer_shapes.values())
    layers = max(1, round((nbytes - 4 * VOCABULARY * hidden) / layer_bytes))
    tensors = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = list(tensors)
    weight_map = {}
    for number in range(files):
        own = names[number * len(names) // files : (number + 1) * len(names) // files]
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        weight_map |= dict.fromkeys(own, file)
        sizes = [2 * int(np.prod(tensors[name])) for name in own]
        with open(path / file, "wb") as out:
            rows = [(n, "BF16", tensors[n], size) for n, size in zip(own, sizes, strict=True)]
            out.write(serialise_header(rows, metadata={"format": "pt"}, align=8))
            for size in sizes:
                out.write(random.bytes(size))
    total = 2 * sum(int(np.prod(shape)) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // GROUPS,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    return total
