"""The network against `transformers`, on small random checkpoints in float32.

For each variant: logits of a whole text, of the same text fed to a cache piece by piece, and of
our own saved copy opened by `transformers`. The figures are printed as a table at the end of the
test run. DeepSeekMoE (`deepseek`), which `transformers` lacks, is held to a plain float64 loop
over tokens and experts, written from the paper.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
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

from moescope.checkpoint import load_model, save_weights
from moescope.families import read_config
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM, initialise

TOLERANCE = 1e-4
BATCH, SEQ, PREFILLED = 2, 23, 9

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
SMALL_YARN = {name: value for name, value in YARN.items() if "mscale" not in name}

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    variant: str, tmp_path: Path, record_property: Any
) -> None:
    theirs = published(VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    input_ids = some_ids()
    with torch.inference_mode():
        expected = theirs(input_ids).logits
        save_weights(ours, tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        differences = (
            difference(ours.logits(ours(input_ids)), expected),
            difference(decoded(ours, input_ids), expected),
            difference(again(input_ids).logits, expected),
        )
    record_property("parity", (variant, *differences))
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_of_deepseek_moe_are_the_papers(norm_topk_prob: bool, record_property: Any) -> None:
    fields = {
        **{name: value for name, value in LATENT.items() if name != "kv_lora_rank"},
        "model_type": "deepseek",
        "norm_topk_prob": norm_topk_prob,
    }
    ours = CausalLM(read_config(fields)).eval()
    initialise(ours, seed=0)
    input_ids = some_ids()
    weights = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    with torch.inference_mode():
        expected = torch.stack([deepseek_moe(weights, row, norm_topk_prob) for row in input_ids])
        differences = (
            difference(ours.logits(ours(input_ids)), expected),
            difference(decoded(ours, input_ids), expected),
        )
    variant = "deepseek, normalised weights" if norm_topk_prob else "deepseek"
    record_property("parity", (variant, *differences, None))
    assert max(differences) <= TOLERANCE


def published(config: PreTrainedConfig) -> Any:
    """A model of `transformers` whose routers and norms are as uneven as trained ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(
            ("gate.weight", "_proj.bias", "router.weight", "router.bias", "_proj_bias", "sinks")
        ):
            tensor.normal_(std=0.5)
    return model


def some_ids() -> Tensor:
    return torch.randint(97, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def decoded(model: CausalLM, input_ids: Tensor) -> Tensor:
    """Logits of a text whose beginning is read at once, and the rest token by token."""
    cache, positions = Cache(), torch.arange(SEQ).expand(BATCH, -1)
    bounds = [0, *range(PREFILLED, SEQ + 1)]
    return torch.cat(
        [
            model.logits(model(input_ids[:, a:b], positions[:, a:b], cache))
            for a, b in itertools.pairwise(bounds)
        ],
        dim=1,
    )


def deepseek_moe(weights: dict[str, Tensor], ids: Tensor, norm_topk_prob: bool) -> Tensor:
    """DeepSeekMoE-16B for one sequence (Dai et al. 2024, eq. 1-5 and 9-11), a step at a time."""
    heads, width, top_k = 4, 48 // 4, 3
    angles = torch.arange(len(ids)).double()[:, None] * 10000.0 ** (
        -torch.arange(0, width, 2).double() / width
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # (seq, width)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.split(width // 2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ (F.silu(gate @ x) * (up @ x))

    def block(x: Tensor, name: str) -> Tensor:
        return swiglu(
            x, *(weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        )

    def mixture(x: Tensor, name: str) -> Tensor:
        scores = (weights[f"{name}.gate.weight"] @ x).softmax(dim=0)
        chosen = scores.argsort(descending=True)[:top_k].tolist()
        total = sum(scores[e] for e in chosen) if norm_topk_prob else 1.0
        output = block(x, f"{name}.shared_experts")
        for expert in chosen:
            gate, up = weights[f"{name}.experts.gate_up_proj"][expert].split(20)
            down = weights[f"{name}.experts.down_proj"][expert]
            output = output + scores[expert] / total * swiglu(x, gate, up, down)
        return output

    stream = weights["model.embed_tokens.weight"][ids]
    for layer in range(3):
        name = f"model.layers.{layer}"
        normed = norm(stream, f"{name}.input_layernorm")
        query, key, value = (
            (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T).view(-1, heads, width)
            for part in "qkv"
        )
        mixed = torch.zeros_like(stream)
        for head in range(heads):
            q, k = rotated(query[:, head]), rotated(key[:, head])
            for at in range(len(ids)):
                shares = (k[: at + 1] @ q[at] / width**0.5).softmax(dim=0)
                mixed[at, head * width : (head + 1) * width] = shares @ value[: at + 1, head]
        stream = stream + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
        normed = norm(stream, f"{name}.post_attention_layernorm")
        feed_forward = mixture if layer else block
        stream = stream + torch.stack([feed_forward(x, f"{name}.mlp") for x in normed])
    return norm(stream, "model.norm") @ weights["lm_head.weight"].T
