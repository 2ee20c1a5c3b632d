"""Counts against what DeepSeek published, `transformers`, real weights and the papers' sums."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moescope import catalog as catalog_module
from moescope.catalog import BOX, catalog
from moescope.families import config_fields, read_config
from moescope.model.costs import Parameters, count_parameters
from moescope.model.decoder import CausalLM

PUBLISHED = {name: entry for name, entry in catalog().items() if "/" in entry.source}
BILLION = 1e9


def count(name: str) -> Parameters:
    return count_parameters(PUBLISHED[name].config)


def test_every_release_is_there_under_its_short_name() -> None:
    distilled = ["qwen-1.5b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-8b", "llama-70b"]
    assert list(PUBLISHED) == [
        "deepseek-moe-16b",
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v3",
        "deepseek-r1",
        *(f"deepseek-r1-distill-{size}" for size in distilled),
        "deepseek-v3.1",
        "deepseek-v3.2-exp",
        "deepseek-v4-flash",
        "deepseek-v4-pro",
        "deepseek-r1-0528-qwen3-8b",
        "kimi-k2-instruct",
        "moonlight-16b-a3b",
        "joyai-llm-flash",
        *("glm-4.7-flash", "glm-4.5", "glm-4.5-air", "glm-4.6", "glm-5"),
        *(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")),
        *("qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-20b", "gpt-oss-120b"),
        *("olmoe-1b-7b-0924", "mixtral-8x7b-v0.1", "mixtral-8x22b-v0.1"),
        *("granite-3.1-1b-a400m", "granite-3.1-3b-a800m", "ernie-4.5-21b-a3b-pt", "minimax-m2"),
    ]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671.03, 37.55),
        ("deepseek-r1", 671.03, 37.55),
        ("deepseek-v2", 235.74, 21.38),
        ("deepseek-v2-lite", 15.71, 2.66),
        ("deepseek-moe-16b", 16.4, 2.83),
        ("qwen3-30b-a3b", 30.5, 3.35),  # model card: 30.5B, 3.3B active
        ("qwen3-235b-a22b", 235.1, 22.2),  # 235B, 22B
        ("mixtral-8x7b-v0.1", 46.7, 12.9),  # "Mixtral of Experts": 47B, 13B
        ("mixtral-8x22b-v0.1", 140.6, 39.15),  # announcement: 141B, 39B
        ("olmoe-1b-7b-0924", 6.92, 1.28),  # paper, table 1: 6.9B, 1.3B
        ("glm-4.7-flash", 29.94, 3.9),  # its name: 30B-A3B
        ("glm-5", 744.0, 41.8),  # its README: 744B, 40B active
        ("kimi-k2-instruct", 1026.4, 32.9),  # report: 1.04T, 32.6B
    ],
)
def test_mixtures_have_the_announced_size(name: str, total: float, active: float) -> None:
    parameters = count(name)
    assert parameters.total / BILLION == pytest.approx(total, rel=0.005)
    assert parameters.active / BILLION == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("deepseek-v4-flash", 284, 13), ("deepseek-v4-pro", 1600, 49)],  # as their READMEs round it
)
def test_v4_has_the_announced_size(name: str, total: float, active: float) -> None:
    parameters = count(name)
    assert parameters.total / BILLION == pytest.approx(total, rel=0.02)
    assert parameters.active_without_embedding / BILLION == pytest.approx(active, abs=0.5)


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("deepseek-v3", 36.7),  # README_WEIGHTS.md of DeepSeek-V3
        ("deepseek-v2-lite", 2.4),  # README.md of DeepSeek-V2
        ("gpt-oss-20b", 3.61),  # model card, table 1: 20.9B, 3.6B
        ("gpt-oss-120b", 5.13),  # the same: 116.8B, 5.1B
        ("granite-3.1-1b-a400m", 0.43),  # its name
        ("granite-3.1-3b-a800m", 0.88),
        ("minimax-m2", 10.4),  # model card: 230B, 10B
        ("joyai-llm-flash", 3.0),  # model card: 48B, 3B
    ],
)
def test_without_the_embedding_the_other_announced_figure_comes_out(
    name: str, active: float
) -> None:
    counted = count(name).active_without_embedding / BILLION
    assert counted == pytest.approx(active, abs=0.1)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("qwen-1.5b", 1.78),
        ("qwen-7b", 7.62),
        ("qwen-14b", 14.77),
        ("qwen-32b", 32.76),
        ("llama-8b", 8.03),
        ("llama-70b", 70.55),
    ],
)
def test_distilled_models_have_their_hubs_size_and_use_all_of_it(name: str, total: float) -> None:
    parameters = count(f"deepseek-r1-distill-{name}")
    assert parameters.total / BILLION == pytest.approx(total, rel=0.005)
    assert parameters.active == parameters.total


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.44),  # model cards: parameters without embedding
        ("qwen3-1.7b", 1.4),
        ("qwen3-4b", 3.6),
        ("qwen3-8b", 6.95),
        ("qwen3-14b", 13.2),
        ("qwen3-32b", 31.2),
        ("qwen3-30b-a3b", 29.9),
        ("qwen3-235b-a22b", 234.0),
    ],
)
def test_qwens_have_as_many_without_embeddings(name: str, billions: float) -> None:
    parameters = count(name)
    bare = parameters.total - parameters.embedding - parameters.lm_head
    assert bare / BILLION == pytest.approx(billions, rel=0.01)


def test_with_prediction_and_its_own_copies_v3_has_the_hubs_685_billion() -> None:
    # The published files hold embedding and head once more for the predictor.
    parameters = count("deepseek-v3")
    stored = parameters.total + parameters.mtp + parameters.embedding + parameters.lm_head
    assert stored / BILLION == pytest.approx(684.5, rel=0.0005)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "deepseek-moe-16b"])
def test_transformers_makes_as_many_of_the_same_config(name: str) -> None:
    fields = config_fields(PUBLISHED[name].config)
    if name in (
        "kimi-k2-instruct",
        "joyai-llm-flash",
    ):  # transformers knows the network by its first name
        fields["model_type"] = "deepseek_v3"
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    counted = sum(
        parameter.numel()
        for full_name, parameter in theirs.named_parameters()
        if not full_name.endswith("e_score_correction_bias")  # a parameter in ERNIE's alone
    )
    assert count(name).total == counted


SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, 40),
        "vocab_size": st.integers(1, 50),
        "intermediate_size": st.integers(1, 60),
        "moe_intermediate_size": st.integers(1, 30),
        "num_attention_heads": st.integers(1, 4),
        "num_hidden_layers": st.integers(1, 4),
        "n_routed_experts": st.integers(3, 9),
        "n_shared_experts": st.integers(0, 2),
        "num_experts_per_tok": st.integers(1, 3),
        "first_k_dense_replace": st.integers(0, 4),
        "kv_lora_rank": st.integers(1, 20),
        "qk_nope_head_dim": st.integers(1, 8),
        "qk_rope_head_dim": st.just(4),
        "v_head_dim": st.integers(1, 8),
        "q_lora_rank": st.none() | st.integers(1, 10),
        "num_nextn_predict_layers": st.integers(0, 2),
        "tie_word_embeddings": st.booleans(),
    }
)


@given(SHAPES)
@settings(max_examples=30)
def test_every_part_follows_the_papers_equations(shape: dict) -> None:
    found = count_parameters(read_config({"model_type": "deepseek_v3", **shape}))
    hidden, heads, layers = (
        shape[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    qk = shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"]
    rank, q_rank = shape["kv_lora_rank"], shape["q_lora_rank"]
    query = heads * qk * hidden if q_rank is None else q_rank * (hidden + heads * qk)
    attention = query + hidden * (rank + shape["qk_rope_head_dim"])
    attention += rank * heads * (shape["qk_nope_head_dim"] + shape["v_head_dim"])
    attention += heads * shape["v_head_dim"] * hidden
    dense = min(layers, shape["first_k_dense_replace"])
    expert = 3 * hidden * shape["moe_intermediate_size"]
    matrix = shape["vocab_size"] * hidden
    sparse, norms = layers - dense, 2 * hidden + rank + (q_rank or 0)

    assert found.attention == layers * attention
    assert found.dense_mlp == dense * 3 * hidden * shape["intermediate_size"]
    assert found.routed_experts == sparse * shape["n_routed_experts"] * expert
    assert found.shared_experts == sparse * shape["n_shared_experts"] * expert
    assert found.router == sparse * shape["n_routed_experts"] * hidden
    assert found.norm == layers * norms + hidden
    assert found.lm_head == matrix
    assert found.embedding == (0 if shape["tie_word_embeddings"] else matrix)

    idle = sparse * (shape["n_routed_experts"] - shape["num_experts_per_tok"]) * expert
    assert found.active == found.total - idle
    assert found.active_without_embedding == found.active - found.embedding
    assert bool(found.mtp) == bool(shape["num_nextn_predict_layers"])


@given(SHAPES)
@settings(max_examples=10)
def test_the_parts_add_up_to_the_weights_of_a_real_model(shape: dict) -> None:
    config = read_config({"model_type": "deepseek_v3", **shape})
    counted = dataclasses.asdict(count_parameters(config))
    total, mtp = counted.pop("total"), counted["mtp"]
    for other in ("active", "active_without_embedding"):
        del counted[other]
    made = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    assert sum(counted.values()) == total + mtp == made


def test_a_folder_of_the_box_is_in_the_catalog(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mini").mkdir()
    config = PUBLISHED["deepseek-r1-distill-qwen-1.5b"].config
    (tmp_path / "mini/config.json").write_text(json.dumps(config_fields(config)))
    monkeypatch.setattr(catalog_module, "BOX", tmp_path)
    assert next(iter(catalog())) == "mini"
    assert catalog()["mini"].config == config


@pytest.mark.skipif(not (BOX / "tiny").exists(), reason="the model in the box is not built yet")
def test_the_model_in_the_box_has_its_recipes_shape() -> None:
    recipe = Path(__file__).parents[1] / "recipes/tiny/moe.toml"
    wanted = read_config(tomllib.loads(recipe.read_text())["model"])
    found = catalog()["tiny"].config
    assert found.trained_length is not None
    of_its_edition = {  # the recipe's next edition has a longer context
        "trained_length": found.trained_length,
        "max_position_embeddings": found.max_position_embeddings,
    }
    assert found == wanted.model_copy(update=of_its_edition)
