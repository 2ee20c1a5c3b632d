"""Every architecture of GGUF: what is written comes back, and is computed as llama.cpp does."""

from typing import Any

import pytest
import torch
from gguf_models import logits_of_llama_cpp, network, write
from torch import Tensor

import moescope
from moescope.families import ARCHITECTURES, FAMILIES
from moescope.formats.gguf.model import GgufModel

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

IDS = torch.randint(0, 320, (1, 60), generator=torch.Generator().manual_seed(0))
DENSE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
MOE: dict[str, Any] = DENSE | {"num_experts_per_tok": 3, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = MOE | {"num_local_experts": 8}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"model_type": "llama", "rope_theta": 5e5},
    "llama, llama3 positions": DENSE
    | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "qwen2, tied": DENSE | {"model_type": "qwen2", "head_dim": None, "tie_word_embeddings": True},
    "qwen3": DENSE | {"model_type": "qwen3"},
    "qwen3_moe": MOE | {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": True},
    "olmoe": MOE
    | {"model_type": "olmoe", "num_experts": 8, "head_dim": None, "num_key_value_heads": 4},
    "mixtral": LOCAL | {"model_type": "mixtral"},
    "granitemoe": LOCAL
    | {
        "model_type": "granitemoe",
        "head_dim": None,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "residual_multiplier": 0.25,
        "logits_scaling": 6.0,
    },
    "glm4_moe": MOE
    | {
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
    },
    "dots1": MOE
    | {
        "model_type": "dots1",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "glm_moe_dsa": MOE
    | {
        "model_type": "glm_moe_dsa",
        "num_key_value_heads": 4,
        "head_dim": None,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "index_n_heads": 32,  # of few, all score a token zero so often that ties decide
        "index_head_dim": 128,  # llama.cpp wants twice the rotated width, and no less than 128
        "index_topk": 8,
        "num_nextn_predict_layers": 0,
    },
    "ernie4_5_moe": MOE
    | {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 3, "head_dim": None},
    "gpt_oss": LOCAL
    | {"model_type": "gpt_oss", "sliding_window": 9, "rope_scaling": None}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "minimax_m2": LOCAL | {"model_type": "minimax_m2", "rotary_dim": 16},
    "deepseek": MOE
    | {
        "model_type": "deepseek",
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
}
UNWRITTEN = {"initializer_range", "trained_length", "eos_token_id"}
"""Fields of a config that a GGUF file does not keep; ours names an end token."""


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = network(VARIANTS[request.param])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 and not name.endswith("norm.weight"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif name.endswith("norm.weight"):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        elif name.endswith("_proj_bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return made, write(made, path), request.param


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


def test_a_model_comes_back(saved: Any) -> None:
    made, path, _ = saved
    config = GgufModel(path).config
    told, wanted = (c.model_dump(exclude=UNWRITTEN) for c in (config, made.config))
    heads = {"head_dim": wanted["head_dim"]}
    assert told | heads == wanted
    found = moescope.load(path, dtype="float32", backend="torch").logits(IDS)
    with torch.inference_mode():
        assert relative(found, made.logits(made(IDS))) < 1e-6


@pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed")
def test_logits_are_those_of_llama_cpp(saved: Any, record_property: Any) -> None:
    made, path, variant = saved
    expected = logits_of_llama_cpp(path, IDS)
    with torch.inference_mode():
        found = made.logits(made(IDS))[0]
    record_property("gguf parity", (variant, relative(found, expected)))
    assert relative(found, expected) < 1e-4


def test_every_architecture_is_tested() -> None:
    tested = {str(fields["model_type"]) for fields in VARIANTS.values()}
    held = {
        family.gguf.architecture
        for name, family in FAMILIES.items()
        if family.gguf is not None and name in tested
    }
    assert held | {"deepseek2"} == set(ARCHITECTURES)
