"""Tiny quantized checkpoints for vLLM 0.32: models whose linear layers are stored otherwise."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,  # of 64: the keys of each of two workers fill a block of 128
    "head_dim": 64,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ATTENTION = {
    "self_attn.k_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    "self_attn.q_proj": (512, 512),
    "self_attn.v_proj": (256, 512),
}
DENSE = ATTENTION | {
    "mlp.down_proj": (512, 768),
    "mlp.gate_proj": (768, 512),
    "mlp.up_proj": (768, 512),
}
SPARSE = ATTENTION | {
    f"block_sparse_moe.experts.{expert}.{name}": (512, 256) if name == "w2" else (256, 512)
    for expert in range(4)
    for name in ("w1", "w2", "w3")
}
Tensors = dict[str, torch.Tensor]


class Noise:
    """Random tensors of the kinds that quantized layers hold, seeded by a name."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def bits(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        info = torch.iinfo(dtype)
        values = torch.randint(
            info.min, info.max, shape, generator=self.generator, dtype=torch.int64
        )
        return values.to(dtype)

    def real(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * 0.05).to(dtype)

    def scale(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) * 0.01 + 0.001).to(dtype)


class Scheme(NamedTuple):
    """How linear layers are stored, and how config.json says it."""

    layer: Callable[[Noise, int, int], Tensors]  # noise, outputs, inputs
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16  # of all else
    attention: tuple[str, ...] = ()  # scalars of each attention layer


def compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": group},
    } | more


def numbers(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    base = {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True}
    return base | {"dynamic": False} | more


def int8(n: Noise, out: int, inner: int) -> Tensors:
    scale = n.scale(out, 1, dtype=torch.bfloat16)
    return {"weight": n.bits(out, inner, dtype=torch.int8), "weight_scale": scale}


def int8_static(n: Noise, out: int, inner: int) -> Tensors:
    zero = n.bits(1, dtype=torch.int8)
    return int8(n, out, inner) | {"input_scale": n.scale(1), "input_zero_point": zero}


def float8(n: Noise, out: int, inner: int) -> Tensors:
    weight = n.real(out, inner, dtype=torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": n.scale()}


def float8_static(n: Noise, out: int, inner: int) -> Tensors:
    return float8(n, out, inner) | {"input_scale": n.scale()}


def float8_channel(n: Noise, out: int, inner: int) -> Tensors:
    return float8(n, out, inner) | {"weight_scale": n.scale(out, 1, dtype=torch.bfloat16)}


def float8_block(name: str) -> Callable[[Noise, int, int], Tensors]:
    def layer(n: Noise, out: int, inner: int) -> Tensors:
        weight = n.real(out, inner, dtype=torch.float8_e4m3fn)
        return {"weight": weight, name: n.scale(out // 128, inner // 128)}

    return layer


def packed(size: int, bits: int = 4, zero: bool = False) -> Callable[[Noise, int, int], Tensors]:
    """Return compressed-tensors' layer of groups of `size` inputs (0: all of them)."""

    def layer(n: Noise, out: int, inner: int) -> Tensors:
        per, groups = 32 // bits, inner // size if size else 1
        made = {
            "weight_packed": n.bits(out, inner // per),
            "weight_scale": n.scale(out, groups, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([out, inner]),
        }
        return made | ({"weight_zero_point": n.bits(out // per, groups)} if zero else {})

    return layer


def gptq(n: Noise, out: int, inner: int) -> Tensors:
    return {
        "qweight": n.bits(inner // 8, out),
        "qzeros": n.bits(inner // 128, out // 8),
        "scales": n.scale(inner // 128, out, dtype=torch.float16),
        "g_idx": torch.arange(inner, dtype=torch.int32) // 128,
    }


def awq(n: Noise, out: int, inner: int) -> Tensors:
    return {
        "qweight": n.bits(inner, out // 8),
        "qzeros": n.bits(inner // 128, out // 8),
        "scales": n.scale(inner // 128, out, dtype=torch.float16),
    }


TOKEN8 = numbers("float", 8, "token", dynamic=True)
GROUP = {"group_size": 32}
SCHEMES = {
    "ct_w8a8_int8": Scheme(
        int8,
        compressed(
            "int-quantized",
            numbers("int", 8, "channel"),
            numbers("int", 8, "token", dynamic=True, symmetric=False),
        ),
    ),
    "ct_w8a8_int8_symmetric": Scheme(
        int8,
        compressed(
            "int-quantized",
            numbers("int", 8, "channel"),
            numbers("int", 8, "token", dynamic=True),
        ),
    ),
    "ct_w8a8_int8_static": Scheme(
        int8_static,
        compressed(
            "int-quantized",
            numbers("int", 8, "channel"),
            numbers("int", 8, "tensor", symmetric=False),
        ),
    ),
    "ct_fp8": Scheme(
        float8_channel,
        compressed("float-quantized", numbers("float", 8, "channel"), TOKEN8),
    ),
    "ct_fp8_static": Scheme(
        float8_static,
        compressed("float-quantized", numbers("float", 8, "tensor"), numbers("float", 8, "tensor")),
    ),
    "ct_fp8_kv": Scheme(
        float8_channel,
        compressed(
            "float-quantized",
            numbers("float", 8, "channel"),
            TOKEN8,
            kv_cache_scheme=numbers("float", 8, "tensor"),
        ),
        attention=("k_scale", "v_scale"),
    ),
    "ct_fp8_block": Scheme(
        float8_block("weight_scale"),
        compressed(
            "float-quantized",
            numbers("float", 8, "block", block_structure=[128, 128]),
            numbers("float", 8, "group", dynamic=True, group_size=128),
        ),
    ),
    "ct_w4_g32": Scheme(
        packed(32), compressed("pack-quantized", numbers("int", 4, "group", **GROUP), None)
    ),
    "ct_w4_g128": Scheme(
        packed(128), compressed("pack-quantized", numbers("int", 4, "group", group_size=128), None)
    ),
    "ct_w4_g32_zero": Scheme(
        packed(32, zero=True),
        compressed("pack-quantized", numbers("int", 4, "group", symmetric=False, **GROUP), None),
    ),
    "ct_w4_g128_zero": Scheme(
        packed(128, zero=True),
        compressed(
            "pack-quantized", numbers("int", 4, "group", symmetric=False, group_size=128), None
        ),
    ),
    "ct_w4_channel": Scheme(
        packed(0), compressed("pack-quantized", numbers("int", 4, "channel"), None)
    ),
    "fp8": Scheme(float8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8_static": Scheme(float8_static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_block": Scheme(
        float8_block("weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "gptq": Scheme(
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        torch.float16,
    ),
    "awq": Scheme(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
        torch.float16,
    ),
}

# Tried and left out: pack-quantized of 8 bits and fp8 weights for 16-bit inputs (no kernel in CPU
# builds). Those of blocks and most experts need AMX to run; zoo_check lets them be built without.
# Experts have no kernel for some others.
NO_EXPERTS = "int8_static w4_g32 w4_g32_zero w4_g128_zero w4_channel"
EXPERTS = [name for name in SCHEMES if not name.endswith(tuple(NO_EXPERTS.split()))]
QUANTIZED = [*SCHEMES, *(f"mixtral_{name}" for name in EXPERTS), "gpt_oss_mxfp4"]


def make(name: str, folder: Path) -> None:
    """Write the quantized checkpoint of that name into the new directory `folder`."""
    noise = Noise(name)
    if name == "gpt_oss_mxfp4":
        config, tensors = gpt_oss(noise)
    else:
        config, tensors = model(noise, SCHEMES[name.removeprefix("mixtral_")], name.startswith("m"))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def model(noise: Noise, scheme: Scheme, sparse: bool) -> tuple[dict[str, Any], Tensors]:
    """Return a llama, or a mixtral."""
    dtype, vocab, hidden = scheme.dtype, CONFIG["vocab_size"], CONFIG["hidden_size"]
    tensors = {
        "lm_head.weight": noise.real(vocab, hidden, dtype=dtype),
        "model.embed_tokens.weight": noise.real(vocab, hidden, dtype=dtype),
        "model.norm.weight": 1 + noise.real(hidden, dtype=dtype),
    }
    for layer in (f"model.layers.{i}" for i in range(CONFIG["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = 1 + noise.real(hidden, dtype=dtype)
        if sparse:
            tensors[f"{layer}.block_sparse_moe.gate.weight"] = noise.real(4, hidden, dtype=dtype)
        for linear, (out, inner) in (SPARSE if sparse else DENSE).items():
            for key, tensor in scheme.layer(noise, out, inner).items():
                tensors[f"{layer}.{linear}.{key}"] = tensor
        for key in scheme.attention:
            tensors[f"{layer}.self_attn.{key}"] = noise.scale()
    if scheme.config["quant_method"] == "compressed-tensors":
        for name in tensors:  # vLLM compares them
            if name.endswith(".w3.input_scale"):
                tensors[name] = tensors[name.replace(".w3.", ".w1.")].clone()
    more = {"dtype": str(dtype).removeprefix("torch."), "quantization_config": scheme.config}
    return CONFIG | (MIXTRAL if sparse else {}) | more, tensors


def gpt_oss(noise: Noise) -> tuple[dict[str, Any], Tensors]:
    """Return a gpt-oss as published: experts in blocks of 32 numbers of 4 bits, with exponents."""
    hidden, inner, experts, vocab = 128, 192, 4, 199
    tensors = {
        "lm_head.weight": noise.real(vocab, hidden),
        "model.embed_tokens.weight": noise.real(vocab, hidden),
        "model.norm.weight": 1 + noise.real(hidden),
    }
    for layer in (f"model.layers.{i}" for i in range(2)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = 1 + noise.real(hidden)
        for name, out in {"q": 128, "k": 64, "v": 64, "o": 128}.items():
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = noise.real(out, hidden)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = noise.real(out)
        tensors[f"{layer}.self_attn.sinks"] = noise.real(4)
        tensors[f"{layer}.mlp.router.weight"] = noise.real(experts, hidden)
        tensors[f"{layer}.mlp.router.bias"] = noise.real(experts)
        for name, out, into in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            linear, blocks = f"{layer}.mlp.experts.{name}_proj", into // 32
            tensors[f"{linear}_bias"] = noise.real(experts, out)
            tensors[f"{linear}_blocks"] = noise.bits(experts, out, blocks, 16, dtype=torch.uint8)
            tensors[f"{linear}_scales"] = noise.bits(experts, out, blocks, dtype=torch.uint8)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "embed_tokens", "lm_head"]
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": plain},
    }
    return CONFIG | config | {"dtype": "bfloat16"}, tensors
