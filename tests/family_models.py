"""Small random models of `transformers`, one for each variant of each family."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV32Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    **COMMON,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
GROUPS = {"n_group": 4, "topk_group": 2}
LIMITED = {**GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 14}
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 3}
LOCAL: dict[str, Any] = {**GROUPED, **MIXTURE, "num_local_experts": 12}
WIDTHS: dict[str, Any] = {"moe_intermediate_size": 20}
SLIDING: dict[str, Any] = {"sliding_window": 7}
INDEXED: dict[str, Any] = {
    **LATENT,
    "q_lora_rank": 20,
    "index_n_heads": 19,  # with few, scores of zero are often tied
    "index_head_dim": 11,
    "index_topk": 5,
}
SMALL_YARN = {name: value for name, value in YARN.items() if "mscale" not in name}
COMPRESSED: dict[str, Any] = {
    **{name: value for name, value in COMMON.items() if name != "intermediate_size"},
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 26,
    "qk_rope_head_dim": 6,
    "q_lora_rank": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 7},
    "num_hash_layers": 1,
    "hc_mult": 3,
    "swiglu_limit": 1.5,
    "sliding_window": 5,
    "o_groups": 2,
    "o_lora_rank": 10,
    "index_n_heads": 19,
    "index_head_dim": 16,
    "index_topk": 3,
}

VARIANTS: dict[str, PreTrainedConfig] = {
    "deepseek_v2, greedy": DeepseekV2Config(**LATENT, topk_method="greedy"),
    "deepseek_v2, greedy, q_lora": DeepseekV2Config(**{**LATENT, "q_lora_rank": 20}),
    "deepseek_v2, group-limited": DeepseekV2Config(**LATENT, **LIMITED),
    "deepseek_v2, group-limited, q_lora": DeepseekV2Config(
        **{**LATENT, "q_lora_rank": 20}, **LIMITED
    ),
    "deepseek_v2, YaRN": DeepseekV2Config(**LATENT, rope_parameters=YARN),
    "deepseek_v3, groups, bias, q_lora": DeepseekV3Config(
        **{**LATENT, "q_lora_rank": 20}, **GROUPS
    ),
    "deepseek_v3, bias": DeepseekV3Config(**LATENT, n_group=1, topk_group=1),
    "deepseek_v3, groups, bias, YaRN": DeepseekV3Config(**LATENT, **GROUPS, rope_parameters=YARN),
    "glm4_moe_lite": Glm4MoeLiteConfig(**{**LATENT, "q_lora_rank": 20}),
    "glm4_moe_lite, dense in between": Glm4MoeLiteConfig(
        **{**LATENT, "q_lora_rank": 20}, mlp_layer_types=["dense", "sparse", "dense"]
    ),
    "deepseek_v32": DeepseekV32Config(**INDEXED, **GROUPS),
    "deepseek_v32, text shorter than index_topk": DeepseekV32Config(
        **INDEXED | {"index_topk": 64}, n_group=1, topk_group=1
    ),
    "deepseek_v32, YaRN": DeepseekV32Config(**INDEXED, **GROUPS, rope_parameters=YARN),
    "glm_moe_dsa": GlmMoeDsaConfig(**INDEXED),
    "glm_moe_dsa, shared picks": GlmMoeDsaConfig(
        **INDEXED, indexer_types=["full", "shared", "full"], attention_bias=True
    ),
    "deepseek_v4": DeepseekV4Config(**COMPRESSED),
    "deepseek_v4, YaRN": DeepseekV4Config(
        **COMPRESSED, rope_scaling=SMALL_YARN | {"rope_theta": 20000.0}
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "qwen3, windows": Qwen3Config(
        **GROUPED, **SLIDING, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **MIXTURE, **WIDTHS, num_experts=12),
    "qwen3_moe, normed, dense in between": Qwen3MoeConfig(
        **GROUPED, **MIXTURE, **WIDTHS, num_experts=12, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "olmoe": OlmoeConfig(**{**COMMON, "num_key_value_heads": 2}, **MIXTURE, num_experts=12),
    "olmoe, clipped": OlmoeConfig(**COMMON, **MIXTURE, num_experts=12, clip_qkv=0.8),
    "mixtral": MixtralConfig(**LOCAL),
    "mixtral, window": MixtralConfig(**LOCAL, **SLIDING),
    "granitemoe": GraniteMoeConfig(
        **{**COMMON, **MIXTURE, "num_key_value_heads": 2},
        num_local_experts=12,
        embedding_multiplier=12.0,
        attention_multiplier=0.015625,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    ),
    "glm4_moe": Glm4MoeConfig(
        **{**GROUPED, "head_dim": 16}, **MIXTURE, **WIDTHS, n_routed_experts=12
    ),
    "glm4_moe, norms and biases": Glm4MoeConfig(
        **{**GROUPED, "head_dim": 16},
        **MIXTURE,
        **WIDTHS,
        n_routed_experts=12,
        use_qk_norm=True,
        attention_bias=True,
        partial_rotary_factor=0.25,
    ),
    "dots1": Dots1Config(
        **GROUPED, **MIXTURE, **WIDTHS, n_routed_experts=12, n_shared_experts=1, norm_topk_prob=True
    ),
    "dots1, windows": Dots1Config(
        **GROUPED,
        **MIXTURE,
        **WIDTHS,
        **SLIDING,
        n_routed_experts=12,
        n_shared_experts=1,
        max_window_layers=1,
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **{**COMMON, "num_key_value_heads": 2}, **WIDTHS, moe_num_experts=12, moe_k=3
    ),
    "ernie4_5_moe, every other layer": Ernie4_5_MoeConfig(
        **COMMON, **WIDTHS, moe_num_experts=12, moe_k=3, moe_layer_interval=2, use_bias=False
    ),
    "gpt_oss": GptOssConfig(**LOCAL, **SLIDING, swiglu_limit=1.5),
    "gpt_oss, YaRN": GptOssConfig(
        **LOCAL, **SLIDING, rope_parameters=SMALL_YARN | {"truncate": False}
    ),
    "minimax_m2": MiniMaxM2Config(**LOCAL),
    "minimax_m2, partly rotated": MiniMaxM2Config(
        **LOCAL,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "partial_rotary_factor": 6 / 14,
        },
    ),
    "llama": LlamaConfig(**{**COMMON, "num_key_value_heads": 2}),
    "llama, llama3 positions": LlamaConfig(
        **{**COMMON, "num_key_value_heads": 1}, rope_parameters=LLAMA3
    ),
    "qwen2": Qwen2Config(**{**COMMON, "num_key_value_heads": 2}),
    "qwen2, tied": Qwen2Config(**{**COMMON, "num_key_value_heads": 2}, tie_word_embeddings=True),
}


def published(config: PreTrainedConfig) -> Any:
    """A model of `transformers` whose routers and norms are as uneven as trained ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2)
        elif name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), config.n_routed_experts).topk(tensor.shape[1])[1])
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(
            ("gate.weight", "_proj.bias", "router.weight", "router.bias", "_proj_bias", "sinks")
        ) or name.endswith(("position_bias", "_hc.base", "hc_base")):
            tensor.normal_(std=0.5)
    return model
