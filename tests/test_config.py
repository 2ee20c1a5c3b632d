import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV2Config

from moescope.config import ModelConfig
from moescope.errors import UserError

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
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def test_positions_are_read_in_deepseeks_dialect_and_in_transformers() -> None:
    theirs = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}}
    ours = {"rope_scaling": YARN, "rope_theta": 500.0}
    first, second = (ModelConfig.from_dict({**SMALL, **dialect}) for dialect in (theirs, ours))
    assert first == second
    assert first.rope_scaling is not None and first.rope_scaling.factor == 40
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert ModelConfig.from_dict({**SMALL, **plain}).rope_scaling is None


def test_what_transformers_writes_is_understood(tmp_path: Path) -> None:
    DeepseekV2Config(**{k: v for k, v in SMALL.items() if k != "model_type"}).save_pretrained(
        tmp_path
    )
    config = ModelConfig.from_file(tmp_path / "config.json")
    assert config.uses_mla and config.n_routed_experts == 8


def test_what_we_write_is_understood_by_transformers_and_by_us(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    fields = {**SMALL, **latent, "q_lora_rank": None, "rope_scaling": YARN}
    config = ModelConfig.from_dict(fields)
    config.save(tmp_path / "config.json")
    assert ModelConfig.from_file(tmp_path / "config.json") == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.q_lora_rank is None
    assert theirs.rope_parameters["factor"] == 40


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 0}, r"`hidden_size` is 0: input should be greater than 0"),
        ({"model_type": "mixtral"}, r"`model_type` is 'mixtral'"),
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
        ModelConfig.from_dict({**SMALL, **change})
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    fields = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    with pytest.raises(UserError, match=r"`vocab_size` is missing"):
        ModelConfig.from_dict(fields)


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
        ModelConfig.from_file(tmp_path / "config.json")


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "some_new_field": {"a": 1}}))
    assert ModelConfig.from_file(tmp_path / "config.json") == ModelConfig.from_dict(SMALL)


def test_expert_layers_follow_first_k_dense_replace_and_frequency() -> None:
    config = ModelConfig.from_dict(
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
