"""Predicted speed: what a sample has, how it is scaled up, and the bytes that kernels read."""

import pytest
import torch

from moescope.catalog import catalog
from moescope.families import read_config
from moescope.kernels import cpu
from moescope.lab import speed as module
from moescope.lab.speed import _Taken, _whole, predict, predict_format, random_model, sample_shape
from moescope.model.cache import Cache
from moescope.model.costs import count_parameters
from moescope.model.moe import GroupedExperts

CACHE = 2**25
SMALL = read_config(
    {
        "model_type": "deepseek_v2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 128,
    }
)
native = pytest.mark.skipif(not cpu.available(), reason="the native kernels are not built")


@pytest.mark.parametrize("name", catalog())
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_a_sample_reads_more_than_the_caches_hold_or_is_whole(name: str, weight_format: str):
    config = catalog()[name].config
    sample = sample_shape(config, weight_format, CACHE)
    parameters = count_parameters(sample)
    read = parameters.active_without_embedding * module.BITS_PER_WEIGHT[weight_format] / 8
    assert read >= 2 * CACHE or sample.num_hidden_layers == config.num_hidden_layers
    assert parameters.total < 2e9
    if config.n_routed_experts is not None:
        moe = [i for i in range(sample.num_hidden_layers) if sample.is_moe_layer(i)]
        assert moe
        assert sample.required("n_routed_experts") >= sample.required("num_experts_per_tok")
        dense = [i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)]
        assert bool(dense) == (len(moe) < sample.num_hidden_layers)


def test_the_model_in_the_box_is_its_own_sample() -> None:
    config = catalog()["tiny"].config
    sample = sample_shape(config, "int8", CACHE)
    assert count_parameters(sample).total == count_parameters(config).total


@pytest.mark.parametrize(("dense", "mixtures"), [(0, 30), (1, 26), (3, 58)])
def test_costs_that_add_up_are_scaled_up_exactly(dense: int, mixtures: int) -> None:
    """Head 40 for a quarter of the vocabulary, dense layer 7, mixture 5, all else 0."""
    config = SMALL.model_copy(
        update={
            "num_hidden_layers": dense + mixtures,
            "first_k_dense_replace": dense,
            "vocab_size": 1024,
        }
    )
    shape = SMALL.model_copy(
        update={"num_hidden_layers": 4, "first_k_dense_replace": min(dense, 1), "vocab_size": 256}
    )
    first = 7 if dense else 5
    rest = 3 * 5
    runs = [[_Taken(40 + first + rest, 40), _Taken(40 + first, 40)] for _ in range(3)]
    assert _whole(config, shape, runs) == pytest.approx(160 + 7 * dense + 5 * mixtures)


@native
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_predicted_bytes_are_those_that_the_kernels_read(weight_format: str) -> None:
    model = random_model(SMALL, weight_format)
    predicted = predict_format(SMALL, weight_format, 16, 1e9, 1e9)
    cache, ids = Cache(), torch.zeros(1, 16, dtype=torch.int64)
    with torch.inference_mode():
        model.logits(model(ids, torch.arange(16)[None], cache))
        before = cpu.weight_bytes_read()
        model.logits(model(ids[:, :1], torch.tensor([[16]]), cache))
    read = cpu.weight_bytes_read() - before
    cached = cache.nbytes * 16 // 17
    assert predicted.decode_bytes == pytest.approx(read + cached, rel=0.1)


def test_all_formats_that_run_here_are_predicted() -> None:
    found = predict(SMALL, prompt=16)
    assert found.prompt == 16
    names = [speed.format for speed in found.speeds]
    assert names == (["bf16", "int8", "int4"] if cpu.available() else ["bf16"])
    for speed in found.speeds:
        assert speed.decode > 0
        assert speed.prefill > 0
        assert speed.decode_limit == pytest.approx(found.read_bandwidth / speed.decode_bytes)


def test_a_prompt_leaves_room_for_what_is_generated() -> None:
    assert predict(SMALL, prompt=10_000).prompt < SMALL.max_position_embeddings


@pytest.mark.parametrize("topk_method", ["relu", "hash", "expert_choice", "sinkhorn", "random"])
def test_a_router_of_another_kind_is_timed_as_greedy(topk_method: str) -> None:
    config = SMALL.model_copy(update={"topk_method": topk_method})
    assert predict_format(config, "bf16", 8, 1e9, 1e9).decode > 0


def test_fewer_experts_get_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_WEIGHTS", 1)
    sample = sample_shape(SMALL, "bf16", CACHE)
    assert sample.n_routed_experts == SMALL.num_experts_per_tok == 2
    rows: list[int] = []
    forward = GroupedExperts.forward

    def counting(experts: GroupedExperts, states: torch.Tensor, *others) -> torch.Tensor:
        rows.append(len(states))
        return forward(experts, states, *others)

    monkeypatch.setattr(GroupedExperts, "forward", counting)
    predict_format(SMALL, "bf16", 32, 1e9, 1e9)
    assert set(rows) == {32, 1, 32 * 2 // 8}  # the prompt, single tokens, a quarter of the prompt
