"""Makes checkpoints to measure with: llama names and shapes, random bfloat16, no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shardstate.header import serialise_header

VOCABULARY, HIDDEN, HEADS, KV_HEADS, MLP = 32000, 2048, 32, 8, 5632
HEAD = HIDDEN // HEADS
_LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (MLP, HIDDEN),
    "mlp.up_proj.weight": (MLP, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, MLP),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}


def make_llama(path: Path, *, nbytes: int, files: int) -> int:
    """Write a llama checkpoint of about `nbytes` bytes in `files` files; return its exact size."""
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in _LAYER.values())
    layers = max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    tensors = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in _LAYER.items()}
    tensors |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
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
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    return total
