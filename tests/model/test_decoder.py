"""What holds for the whole network, whatever its family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.engine.cache import Cache
from moescope.model.decoder import CausalLM, initialise
from moescope.model.recorder import Recorder
from moescope.model.routing import ROUTERS, Routing

DENSE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
LATENT: dict[str, Any] = {
    **DENSE,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek": {k: v for k, v in LATENT.items() if k != "kv_lora_rank"},
    "deepseek_v2": LATENT | {"q_lora_rank": 9},
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
    "llama": DENSE | {"num_key_value_heads": 2},
    "qwen2": DENSE | {"num_key_value_heads": 1},
}


def network(model_type: str, **more: Any) -> CausalLM:
    config = ModelConfig.from_dict({**FAMILIES[model_type], "model_type": model_type, **more})
    made = CausalLM(config)
    initialise(made, seed=0)
    return made.double().eval()


def some_ids(batch: int, seq: int, seed: int = 1) -> Tensor:
    return torch.randint(61, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_pieces_through_a_cache_equal_the_whole_text(model_type: str) -> None:
    """Prefill, several tokens at once, then single ones (absorbed attention for latents)."""
    made, input_ids = network(model_type), some_ids(2, 15)
    with torch.inference_mode():
        whole = made(input_ids)
        cache, pieces = Cache(), []
        for start, end in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 15)):
            positions = torch.arange(start, end).expand(2, -1)
            pieces.append(made(input_ids[:, start:end], positions, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_later_tokens_change_nothing_before_them(model_type: str) -> None:
    made, input_ids = network(model_type), some_ids(1, 12)
    changed = input_ids.clone()
    changed[:, 7:] = some_ids(1, 5, seed=2)
    with torch.inference_mode():
        before, after = made(input_ids), made(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_of_a_batch_know_nothing_of_each_other(model_type: str) -> None:
    made, input_ids = network(model_type), some_ids(3, 9)
    with torch.inference_mode():
        together = made(input_ids)
        alone = torch.cat([made(row[None]) for row in input_ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # routers are float32


def test_the_latent_cache_holds_latents_alone() -> None:
    """DeepSeek-V2, section 2.1.2: latent and rotated key, whatever the number of heads."""
    made, cache = network("deepseek_v2"), Cache()
    with torch.inference_mode():
        made(some_ids(2, 7), torch.arange(7).expand(2, -1), cache)
    assert cache.nbytes == 2 * 7 * 3 * (12 + 4) * 8


class Watcher(Recorder):
    wants_attention = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, tuple[int, ...]]] = []

    def embedding(self, hidden_states: Tensor) -> None:
        self.seen.append(("embedding", -1, tuple(hidden_states.shape)))

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        self.seen.append(("attention", layer_idx, tuple(probabilities.shape)))

    def routing(self, layer_idx: int, routing: Routing) -> None:
        self.seen.append(("routing", layer_idx, tuple(routing.topk_ids.shape)))

    def experts(self, layer_idx: int, routed_output: Tensor, shared_output: Tensor | None) -> None:
        assert shared_output is not None
        self.seen.append(("experts", layer_idx, tuple(routed_output.shape)))

    def layer(self, layer_idx: int, hidden_states: Tensor) -> None:
        self.seen.append(("layer", layer_idx, tuple(hidden_states.shape)))


def test_a_recorder_sees_every_station_in_order_and_changes_no_bit() -> None:
    made, input_ids, watcher = network("deepseek_v3"), some_ids(2, 5), Watcher()
    with torch.inference_mode():
        assert torch.equal(made(input_ids, recorder=watcher), made(input_ids))
    expected: list[tuple[str, int, tuple[int, ...]]] = [("embedding", -1, (2, 5, 24))]
    for layer_idx in range(3):
        expected.append(("attention", layer_idx, (2, 4, 5, 5)))
        if layer_idx:
            expected += [("routing", layer_idx, (10, 3)), ("experts", layer_idx, (10, 24))]
        expected.append(("layer", layer_idx, (2, 5, 24)))
    assert watcher.seen == expected


@pytest.mark.parametrize("topk_method", ROUTERS)
def test_every_router_works_in_every_layer_and_trains_end_to_end(topk_method: str) -> None:
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
    made = network("deepseek_v2", topk_method=topk_method, **groups).float().train()
    hidden_states = made(some_ids(2, 16))
    made.logits(hidden_states).square().mean().backward()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (topk_method in ("hash", "random"))
    assert all("gate.weight" in name for name in frozen)


def test_prediction_depths_send_gradients_into_the_main_model() -> None:
    made = network("deepseek_v3", num_nextn_predict_layers=1).train()
    assert made.mtp is not None
    input_ids = some_ids(2, 6)
    hidden_states = made(input_ids[:, :-1])
    positions = torch.arange(5).expand(2, -1)
    rotation = made.model.rotary_emb(positions, torch.float64)
    depth: Any = made.mtp.depths[0]
    output = depth(
        hidden_states,
        made.model.embed_tokens(input_ids[:, 1:]),
        input_ids[:, 1:],
        rotation,
        positions,
    )
    assert output.shape == (2, 5, 24)
    output.square().sum().backward()
    for name in ("layers.0.self_attn.o_proj.weight", "embed_tokens.weight"):
        gradient = made.model.get_parameter(name).grad
        assert gradient is not None and bool(gradient.any())


def test_the_seed_decides_every_weight() -> None:
    first, same, other = network("deepseek_v3"), network("deepseek_v3"), network("deepseek_v3")
    initialise(other, seed=1)
    for (name, a), (_, b), (_, c) in zip(
        first.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_maps_into_the_residual_stream_begin_smaller() -> None:
    made = network("llama", hidden_size=256, intermediate_size=512)
    layer = made.model.layers[1]
    assert float(layer.get_parameter("mlp.gate_proj.weight").std()) == pytest.approx(0.3, rel=0.02)
    for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight"):
        assert float(layer.get_parameter(name).std()) == pytest.approx(0.3 / 6**0.5, rel=0.02)
