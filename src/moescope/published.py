"""The shapes of published models, as far as they decide on sizes and work."""

from typing import Any

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
_MOE_16B = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
_V3: dict[str, Any] = _MLA | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "max_position_embeddings": 163840,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
# What its family has by default is left out (`families/deepseek_v4.py`).
_V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "num_experts_per_tok": 6,
    "max_position_embeddings": 1048576,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_GLM4_MOE = {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
_GLM4_5 = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "use_qk_norm": True,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
_MIXTRAL = {
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
_GRANITE_MOE = {
    "model_type": "granitemoe",
    "vocab_size": 49155,
    "intermediate_size": 512,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}


def _qwen3(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/deepseek-moe-16b-base": _MOE_16B
    | {"model_type": "deepseek", "num_hidden_layers": 28, "max_position_embeddings": 4096},
    "deepseek-ai/DeepSeek-V2": _MLA
    | {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-ai/DeepSeek-V2-Lite": _MLA
    | _MOE_16B
    | {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-ai/DeepSeek-V3": _V3,
    "deepseek-ai/DeepSeek-R1": _V3,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "deepseek-ai/DeepSeek-V3.1": _V3,
    "deepseek-ai/DeepSeek-V3.2-Exp": _V3
    | {"model_type": "deepseek_v32", "num_nextn_predict_layers": 0}
    | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    "deepseek-ai/DeepSeek-V4-Flash": _V4
    | {
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "n_routed_experts": 256,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4],
    },
    "deepseek-ai/DeepSeek-V4-Pro": _V4
    | {
        "hidden_size": 7168,
        "moe_intermediate_size": 3072,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_routed_experts": 384,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "routed_scaling_factor": 2.5,
        "compress_ratios": [128, 128, *[4, 128] * 29, 4],
    },
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": _qwen3(4096, 12288, 36, 32)
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "moonshotai/Kimi-K2-Instruct": _V3
    | {
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 131072,
        "rope_theta": 50000.0,
        "rope_scaling": _YARN | {"factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonshotai/Moonlight-16B-A3B": _MLA
    | _MOE_16B
    | {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "intermediate_size": 11264,
        "num_hidden_layers": 27,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
    },
    "zai-org/GLM-4.7-Flash": _MLA
    | {
        "model_type": "glm4_moe_lite",
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "zai-org/GLM-4.5": _GLM4_MOE | _GLM4_5 | {"max_position_embeddings": 131072},
    "zai-org/GLM-4.5-Air": _GLM4_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
    },
    "zai-org/GLM-4.6": _GLM4_MOE | _GLM4_5 | {"max_position_embeddings": 202752},
    "zai-org/GLM-5": _MLA
    | {
        "model_type": "glm_moe_dsa",
        "vocab_size": 154880,
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 2048,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
    },
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 6144, 48, 32) | _QWEN3_MOE | {"moe_intermediate_size": 768},
    "Qwen/Qwen3-235B-A22B": _qwen3(4096, 12288, 94, 64)
    | _QWEN3_MOE
    | {"moe_intermediate_size": 1536},
    "openai/gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "openai/gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "allenai/OLMoE-1B-7B-0924": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768,
    },
    "mistralai/Mixtral-8x22B-v0.1": _MIXTRAL
    | {
        "vocab_size": 32000,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65536,
    },
    "ibm-granite/granite-3.1-1b-a400m-base": _GRANITE_MOE
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_local_experts": 32,
    },
    "ibm-granite/granite-3.1-3b-a800m-base": _GRANITE_MOE
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_local_experts": 40,
    },
    "baidu/ERNIE-4.5-21B-A3B-PT": {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_k": 6,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "MiniMaxAI/MiniMax-M2": {
        "model_type": "minimax_m2",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
    },
}
"""By Hub name, what decides on the sizes of the network in the `config.json` found there; Granite's
multipliers, which decide on none, are left out. Counted against the sizes that the publishers give
in `tests/test_catalog.py`."""
