import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config

from moescope.checkpoint import save_weights
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import (
    config_fields,
    open_config,
    others_route_alike,
    read_config,
    save_config,
)
from moescope.formats.gguf.metadata import architecture_of
from moescope.model.decoder import CausalLM, initialise

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
STRETCHED = {"factor": 40, "original_max_position_embeddings": 4096}
YARN = {"type": "yarn", **STRETCHED}
TRANSFORMERS_FAMILIES = ["deepseek_v2", "deepseek_v3", "llama", "qwen2"]


def test_positions_are_read_in_deepseeks_dialect_and_in_transformers() -> None:
    theirs = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **STRETCHED}}
    ours = {"rope_scaling": YARN, "rope_theta": 500.0}
    first, second = (read_config({**SMALL, **dialect}) for dialect in (theirs, ours))
    assert first == second
    assert first.rope_scaling is not None and first.rope_scaling.factor == 40
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert read_config({**SMALL, **plain}).rope_scaling is None


def test_what_transformers_writes_is_understood(tmp_path: Path) -> None:
    DeepseekV2Config(**{k: v for k, v in SMALL.items() if k != "model_type"}).save_pretrained(
        tmp_path
    )
    config = open_config(tmp_path / "config.json")
    assert config.uses_mla and config.n_routed_experts == 8


def test_what_we_write_is_understood_by_transformers_and_by_us(tmp_path: Path) -> None:
    fields = {**SMALL, **LATENT, "q_lora_rank": None, "rope_scaling": YARN}
    config = read_config(fields)
    save_config(config, tmp_path / "config.json")
    assert open_config(tmp_path / "config.json") == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.q_lora_rank is None
    assert theirs.rope_parameters["factor"] == 40


def of_family(model_type: str) -> ModelConfig:
    mixture = model_type.startswith("deepseek_")
    more = {**LATENT, "topk_group": 1, "n_group": 2} if mixture else {"num_key_value_heads": 2}
    return read_config({**SMALL, **more, "model_type": model_type})


@pytest.mark.parametrize("model_type", TRANSFORMERS_FAMILIES)
def test_no_field_is_lost_on_the_way_through_transformers(model_type: str, tmp_path: Path) -> None:
    config = of_family(model_type)
    save_config(config, tmp_path / "config.json")
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert hasattr(transformers, theirs.architectures[0])
    theirs.save_pretrained(tmp_path / "theirs")
    back = open_config(tmp_path / "theirs/config.json")
    changes = {} if model_type == "qwen2" else {"head_dim": 4}  # width of the rotated part
    assert back == config.model_copy(update=changes)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_transformers_adds_no_shared_experts_to_a_model_without(
    model_type: str, tmp_path: Path
) -> None:
    ours = CausalLM(of_family(model_type))
    initialise(ours, seed=0)
    save_weights(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    input_ids = torch.arange(10)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(ours(input_ids)), theirs(input_ids).logits)


@pytest.mark.parametrize("model_type", TRANSFORMERS_FAMILIES)
def test_token_ids_that_a_model_lacks_are_not_made_up(model_type: str, tmp_path: Path) -> None:
    """V3's default in `transformers` would end every text at token 1."""
    save_config(of_family(model_type), tmp_path / "config.json")
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id is None and theirs.bos_token_id is None


def test_what_a_family_takes_for_granted_is_filled_in() -> None:
    v3 = read_config({**SMALL, **LATENT, "model_type": "deepseek_v3"})
    assert (v3.scoring_func, v3.topk_method) == ("sigmoid", "noaux_tc")
    assert (v3.norm_topk_prob, v3.routed_scaling_factor) == (True, 2.5)
    assert (v3.n_group, v3.topk_group) == (1, 1)
    v2 = read_config(SMALL)
    assert (v2.scoring_func, v2.topk_method) == ("softmax", "greedy")
    assert (v2.norm_topk_prob, v2.routed_scaling_factor) == (False, 1.0)
    said = {"scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0}
    other = read_config({**SMALL, "model_type": "deepseek_v3", **said})
    assert said.items() <= other.model_dump().items()


@pytest.mark.parametrize(
    ("model_type", "interleave", "bias", "experts"),
    [
        ("deepseek", False, False, 8),
        ("deepseek_v2", True, False, 8),
        ("deepseek_v3", True, False, 8),
        ("llama", False, False, None),
        ("qwen2", False, True, None),
    ],
)
def test_what_sets_the_families_apart(
    model_type: str, interleave: bool, bias: bool, experts: int | None
) -> None:
    config = read_config({**SMALL, "model_type": model_type})
    assert config.rope_interleave == interleave
    assert config.attention_bias == bias
    assert config.n_routed_experts == experts
    assert config.num_key_value_heads == config.num_attention_heads


def test_the_width_of_a_head_is_given_divided_or_latent() -> None:
    assert read_config(SMALL).qk_head_dim == 16 // 4
    assert read_config({**SMALL, "head_dim": 10}).qk_head_dim == 10
    assert read_config({**SMALL, **LATENT}).qk_head_dim == 6 + 4


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read_config(SMALL).vocab_size = 7


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model_type": st.sampled_from(["deepseek", *TRANSFORMERS_FAMILIES]),
            "rope_scaling": st.sampled_from([None, YARN, {"type": "linear", "factor": 2.0}]),
            "topk_method": st.sampled_from(["greedy", "noaux_tc", "relu", "expert_choice", "hash"]),
            "scoring_func": st.sampled_from(["softmax", "sigmoid"]),
            "norm_topk_prob": st.booleans(),
            "routed_scaling_factor": st.floats(0.1, 20),
            "rms_norm_eps": st.floats(1e-9, 1e-3),
            "n_shared_experts": st.integers(0, 3),
            "q_lora_rank": st.none() | st.integers(1, 9),
            "num_nextn_predict_layers": st.integers(0, 2),
            "eos_token_id": st.none() | st.integers(0, 49) | st.lists(st.integers(0, 49)),
            "tie_word_embeddings": st.booleans(),
        },
    ),
    st.booleans(),
)
def test_a_config_survives_its_own_json(change: dict[str, Any], latent: bool) -> None:
    config = read_config({**SMALL, **(LATENT if latent else {}), **change})
    assert read_config(json.loads(json.dumps(config_fields(config)))) == config


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("deepseek_v3", {"topk_method": "relu"}),
        ("deepseek_v3", {"topk_method": "noaux_tc", "scoring_func": "softmax"}),
        ("deepseek_v2", {"topk_method": "hash"}),
        ("deepseek_v2", {"topk_method": "greedy", "norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "greedy", "scoring_func": "sigmoid"}),
        ("deepseek", {"topk_method": "expert_choice"}),
    ],
)
def test_a_router_that_others_would_compute_otherwise_is_no_familys(
    model_type: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """Under the family's name `transformers` opens the folder and routes by its own rule."""
    latent = {} if model_type == "deepseek" else LATENT
    config = read_config({**SMALL, **latent, "model_type": model_type, **change})
    assert not others_route_alike(config)
    save_config(config, tmp_path / "config.json")
    with pytest.raises(ValueError, match="moescope"):
        AutoConfig.from_pretrained(tmp_path)
    assert open_config(tmp_path / "config.json") == config


def test_a_lost_router_of_another_family_is_no_familys(tmp_path: Path) -> None:
    """Qwen's dialect has no word for it, so that even moescope would open another model."""
    told = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    plain = read_config({**SMALL, **told, "num_key_value_heads": 2, "model_type": "qwen3_moe"})
    assert others_route_alike(plain)
    config = plain.model_copy(update={"topk_method": "relu"})
    save_config(config, tmp_path / "config.json")
    assert open_config(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="moescope"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("topk_method", ["relu", "expert_choice", "hash"])
def test_gguf_has_no_words_for_some_routers(topk_method: str) -> None:
    v3 = read_config({**SMALL, **LATENT, "model_type": "deepseek_v3"})
    assert architecture_of(v3).architecture == "deepseek2"
    with pytest.raises(UserError, match=f"a router of the kind {topk_method}.*safetensors"):
        architecture_of(v3.model_copy(update={"topk_method": topk_method}))


def test_a_model_of_its_own_kind_names_a_known_family() -> None:
    with pytest.raises(UserError, match="`model_type` is 'unheard'"):
        read_config({**SMALL, "model_type": "moescope", "family": "unheard"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn': input should be an object"),
        ({"rope_parameters": [1]}, r"`rope_parameters` is \[1\]: input should be an object"),
        ({"rope_scaling": {"type": "yarn"}}, "`rope_scaling.factor` is missing"),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2}},
            "`rope_scaling.type` is 'ntk': input should be 'yarn', 'linear' or 'llama3'",
        ),
        ({"routed_scaling_factor": float("nan")}, "`routed_scaling_factor` is nan: .* finite"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "`rope_scaling.factor` is inf: "),
        ({"num_experts_per_tok": None}, "lacks `num_experts_per_tok`"),
        (
            {"hidden_act": "gelu"},
            "`hidden_act` is 'gelu': .*; moescope does not compute this, so choose another model",
        ),
        ({"hidden_size": 0}, r"`hidden_size` is 0: input should be greater than 0"),
        ({"model_type": "mamba"}, r"`model_type` is 'mamba'"),
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            "layers 0 of this qwen3_next model are Gated DeltaNet",
        ),
        (
            {"model_type": "qwen3_moe", "layer_types": ["full_attention", "linear_attention"] * 2},
            "layers 1, 3 of this qwen3_moe model are linear_attention, which moescope does not",
        ),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds n_routed_experts 8"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "no multiple of"),
        (
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5},
            "exceeds n_group 4",
        ),
        (
            {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 1},
            "exceeds the experts of topk_group 1",
        ),
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 4}, "lacks `qk_rope_head_dim`"),
        ({"hidden_size": 12}, "even width, not 3"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        read_config({**SMALL, **change})
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    fields = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    with pytest.raises(UserError, match=r"`vocab_size` is missing"):
        read_config(fields)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "cannot read .* as JSON"), ("[1]", "holds no JSON object"), (None, "there is no ")],
)
def test_a_file_that_is_no_config_is_a_sentence(
    content: str | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_config(tmp_path / "config.json")


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "some_new_field": {"a": 1}}))
    assert open_config(tmp_path / "config.json") == read_config(SMALL)


def test_expert_layers_follow_first_k_dense_replace_and_frequency() -> None:
    config = read_config(
        {**SMALL, "num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2}
    )
    assert [config.is_moe_layer(layer) for layer in range(6)] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
