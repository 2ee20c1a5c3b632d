"""What holds for the whole network, whatever its family."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.families import read_config
from moescope.model.cache import Cache
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
MIXTURE = ("mlp.gate", "mlp.experts", "mlp.shared_experts")
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek": {k: v for k, v in LATENT.items() if k != "kv_lora_rank"},
    "deepseek_v2": LATENT | {"q_lora_rank": 9},
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
    "llama": DENSE | {"num_key_value_heads": 2},
    "qwen2": DENSE | {"num_key_value_heads": 1},
}


def network(model_type: str, **more: Any) -> CausalLM:
    config = read_config({**FAMILIES[model_type], "model_type": model_type, **more})
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
def test_training_computes_what_inference_does(model_type: str) -> None:
    """Attention has a path of its own where gradients are wanted."""
    made, input_ids = network(model_type), some_ids(2, 15)
    with torch.inference_mode():
        expected = made(input_ids)
    trained = made(input_ids)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), expected, rtol=1e-5, atol=1e-5)


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


class Keeper(Recorder):
    wants_attention = True

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], Any] = {}

    def embedding(self, hidden_states: Tensor) -> None:
        self.seen["embed_tokens", -1] = hidden_states

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        self.seen["attention", layer_idx] = probabilities

    def routing(self, layer_idx: int, routing: Routing) -> None:
        self.seen["mlp.gate", layer_idx] = routing

    def experts(self, layer_idx: int, routed_output: Tensor, shared_output: Tensor | None) -> None:
        self.seen["mlp.experts", layer_idx] = routed_output
        self.seen["mlp.shared_experts", layer_idx] = shared_output

    def layer(self, layer_idx: int, hidden_states: Tensor) -> None:
        self.seen["", layer_idx] = hidden_states


def hooked(made: CausalLM, names: list[str]) -> dict[str, Any]:
    """Fill a dictionary with the outputs of submodules, and the inputs of `o_proj`."""
    outputs: dict[str, Any] = {}
    for name in names:

        def keep(_: Any, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
            outputs[name] = inputs[0] if name.endswith("o_proj") else output

        made.model.get_submodule(name).register_forward_hook(keep)
    return outputs


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_recorder_is_handed_what_was_computed(model_type: str) -> None:
    made, keeper = network(model_type), Keeper()
    mixtures = [1, 2] if "deepseek" in model_type else []
    names = [f"layers.{i}.{part}" for i in mixtures for part in MIXTURE]
    values = "kv_b_proj" if made.config.uses_mla else "v_proj"
    names += [f"layers.{i}.self_attn.{part}" for i in range(3) for part in ("o_proj", values)]
    names += ["embed_tokens", *(f"layers.{i}" for i in range(3))]
    outputs = hooked(made, names)
    with torch.inference_mode():
        made(some_ids(2, 7), recorder=keeper)
    stations = keeper.seen.keys() - {("attention", i) for i in range(3)}
    assert len(stations) == 1 + 3 + 3 * len(mixtures)
    for part, layer_idx in stations:
        name = part if layer_idx < 0 else f"layers.{layer_idx}.{part}".rstrip(".")
        assert keeper.seen[part, layer_idx] is outputs[name]
    for i in range(3):  # probabilities are those that mixed the values
        probabilities = keeper.seen["attention", i]
        value = outputs[f"layers.{i}.self_attn.{values}"]
        heads = 4 if made.config.uses_mla else made.config.num_key_value_heads
        value = value.unflatten(-1, (heads, -1)).transpose(1, 2)
        if made.config.uses_mla:
            value = value[..., 6:]
        value = torch.stack([value[:, head * heads // 4] for head in range(4)], dim=1)
        mixed = (probabilities.double() @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            mixed, outputs[f"layers.{i}.self_attn.o_proj"], rtol=1e-4, atol=1e-5
        )


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


def normed(states: Tensor, weight: Tensor) -> Tensor:
    return states / (states.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def random_norms(made: CausalLM) -> None:
    """One by one, the weights of norms are indistinguishable from none at all."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3))


def run_depth(made: CausalLM, hidden_states: Tensor, embedded: Tensor, ids: Tensor) -> Tensor:
    assert made.mtp is not None
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    rotation = made.model.rotary_emb(positions, hidden_states.dtype)
    return made.mtp.depths[0](hidden_states, embedded, ids, rotation, positions)


def test_a_prediction_depth_is_equation_21_and_a_layer() -> None:
    """DeepSeek-V3: `eh_proj` takes the embedding before the state, as the released weights do."""
    made, ids = network("deepseek_v3", num_nextn_predict_layers=1), some_ids(2, 5)
    random_norms(made)
    assert made.mtp is not None
    depth: Any = made.mtp.depths[0]
    states, embedded = torch.randn(
        2, 2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    joined = torch.cat(
        [normed(embedded, depth.enorm.weight), normed(states, depth.hnorm.weight)], dim=-1
    )
    seen: list[Tensor] = []
    depth.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    depth.layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    output = run_depth(made, states, embedded, ids)
    torch.testing.assert_close(seen[0], joined @ depth.eh_proj.weight.T, rtol=1e-5, atol=1e-5)
    assert output is seen[1] and output.shape == (2, 5, 24)


def test_prediction_depths_count_on_from_the_last_layer() -> None:
    """So they are mixtures, whatever the first layers are, and are told apart by recorders."""
    made = network("deepseek_v3", num_nextn_predict_layers=2)
    assert made.mtp is not None
    for depth, layer_idx in zip(made.mtp.depths, (3, 4), strict=True):
        assert depth.get_submodule("layer").layer_idx == layer_idx
        assert depth.get_submodule("layer.mlp").layer_idx == layer_idx
        assert depth.get_submodule("layer.mlp.gate").n_routed_experts == 8


def test_prediction_depths_send_gradients_into_states_and_embedding() -> None:
    made, ids = network("deepseek_v3", num_nextn_predict_layers=1).train(), some_ids(2, 6)
    for from_states in (True, False):
        made.zero_grad()
        hidden_states, embedded = made(ids[:, :-1]), made.model.embed_tokens(ids[:, 1:])
        if from_states:
            embedded = embedded.detach()
        else:
            hidden_states = hidden_states.detach()
        run_depth(made, hidden_states, embedded, ids[:, 1:]).square().sum().backward()
        trunk = made.model.get_parameter("layers.0.self_attn.o_proj.weight").grad
        assert (trunk is not None and bool(trunk.any())) == from_states
        table = made.model.embed_tokens.weight.grad
        assert table is not None and bool(table.any())


def test_further_tokens_are_learned() -> None:
    """Trained for the token after the next alone, the model learns a text by heart."""
    made = network("deepseek_v3", num_nextn_predict_layers=1).float().train()
    assert made.mtp is not None
    ids, norm = some_ids(4, 14), made.mtp.depths[0].get_submodule("norm")
    optimizer = torch.optim.Adam((p for p in made.parameters() if p.requires_grad), lr=0.01)
    losses: list[float] = []
    for _ in range(60):
        hidden_states, inputs = made(ids[:, :-2]), ids[:, 1:-1]
        output = norm(run_depth(made, hidden_states, made.model.embed_tokens(inputs), inputs))
        loss = F.cross_entropy(made.logits(output).flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4  # ln 61 = 4.1
    assert losses[-1] < 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_normed_states_times_the_head_in_float32(tied: bool) -> None:
    made, input_ids = network("llama", tie_word_embeddings=tied), some_ids(2, 5)
    random_norms(made)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    head = made.model.embed_tokens.weight if tied else made.lm_head.weight
    with torch.inference_mode():
        expected = normed(made.model(input_ids), made.model.norm.weight) @ head.T
        logits = made.logits(made(input_ids))
        assert made.bfloat16().logits(made(input_ids)).dtype == torch.float32
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_norms_begin_at_one_and_biases_at_zero() -> None:
    made = network("qwen2")
    flat = {name: p for name, p in made.named_parameters() if p.ndim == 1}
    assert {name.rsplit(".", 1)[1] for name in flat} == {"weight", "bias"}
    for name, parameter in flat.items():
        assert bool((parameter == (0 if name.endswith("bias") else 1)).all()), name


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
    assert float(layer.get_parameter("mlp.gate_proj.weight").detach().std()) == pytest.approx(
        0.3, rel=0.02
    )
    for name in ("mlp.down_proj.weight", "self_attn.o_proj.weight"):
        assert float(layer.get_parameter(name).detach().std()) == pytest.approx(
            0.3 / 6**0.5, rel=0.02
        )
