"""Which columns count, held to plain passes over whole networks, and what int4 gains by it."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packing import SMALL, expert_reader
from torch import Tensor, nn

from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM, initialise, without_numbers
from moescope.model.moe import GroupedExperts
from moescope.model.rope import RotaryEmbedding
from moescope.native import importance, network
from moescope.native.importance import PRIOR, TOKENS, weigh_layers
from moescope.native.network import EMBEDDING, Packer

EXPERTS = {"moe_intermediate_size": 48, "n_routed_experts": 8, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12, "v_head_dim": 20}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "v3": {**EXPERTS, **LATENT, "model_type": "deepseek_v3", "num_experts_per_tok": 3},
    "relu": {
        **EXPERTS,
        **LATENT,
        "model_type": "deepseek_v3",
        "topk_method": "relu",
        "num_experts_per_tok": 1,
    },
    "grouped": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt-oss": GPT_OSS,
}


def whole(name: str, seed: int = 0) -> CausalLM:
    """A network with norms that let channels differ, as those of trained ones do."""
    made = CausalLM(read_config({**SMALL, **NETWORKS[name]}))
    initialise(made, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in made.named_parameters():
        if "norm" in parameter_name:
            spread = torch.randn(parameter.shape, generator=generator).exp()
            parameter.data *= spread
    return made.eval().requires_grad_(False)


def emptied(made: CausalLM) -> CausalLM:
    """The same network before it is packed: what is packed is on the meta device."""
    empty = without_numbers(made.config)
    wanted = Packer("int4").wants(empty)
    state = {name: one for name, one in made.state_dict().items() if name not in wanted}
    empty.load_state_dict(state, strict=False, assign=True)
    if made.config.tie_word_embeddings:
        empty.lm_head.weight = empty.model.embed_tokens.weight
    empty.model.rotary_emb = RotaryEmbedding(made.config)
    for name, buffer in made.named_buffers():
        parent, _, child = name.rpartition(".")
        empty.get_submodule(parent).register_buffer(child, buffer, persistent=False)
    return empty.eval()


def found(made: CausalLM) -> tuple[dict[str, Tensor], Tensor]:
    all_found: dict[str, Tensor] = {}

    def take(_layer_idx: int, of_layer: importance.Importance) -> None:
        all_found.update(of_layer)

    table = made.state_dict()[EMBEDDING]
    of_head = weigh_layers(emptied(made), table, made.state_dict().__getitem__, take)
    return all_found, of_head


def read_ids(made: CausalLM) -> Tensor:
    shape = 1, min(TOKENS, made.config.max_position_embeddings)
    return torch.randint(made.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_maps_columns_count_as_the_mean_squares_of_what_a_plain_pass_gives_them(
    name: str,
) -> None:
    made = whole(name)
    expected: dict[str, Tensor] = {}

    def note(at: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].double().flatten(0, -2)
            expected[f"{at}.weight"] = (rows**2).sum(dim=0) / len(rows)

        return hook

    for at, module in made.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(at))
    made(read_ids(made))
    all_found, _ = found(made)
    assert expected
    for at, mean in expected.items():
        torch.testing.assert_close(all_found[at].double(), mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["v3", "relu", "gpt-oss"])
def test_experts_columns_count_as_what_their_own_tokens_give_them_and_a_little_the_others(
    name: str,
) -> None:
    made = whole(name)
    given: dict[str, tuple[GroupedExperts, Tensor, Tensor]] = {}

    def note(at: str) -> Any:
        def hook(module: GroupedExperts, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            given[at] = module, inputs[0], inputs[1]

        return hook

    for at, module in made.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, GroupedExperts):
            module.register_forward_pre_hook(note(at))
    made(read_ids(made))
    all_found, _ = found(made)
    assert given
    for at, (experts, tokens, topk_ids) in given.items():
        count = len(experts.down_proj)
        own_outer: list[Tensor] = []
        own_inner: list[Tensor] = []
        visits: list[int] = []
        for expert in range(count):
            rows = [token for token in range(len(tokens)) if expert in topk_ids[token].tolist()]
            visits.append(len(rows))
            outer, inner = torch.zeros(96).double(), torch.zeros(48).double()
            for token in rows:
                x = tokens[token]
                bias = experts.gate_up_proj_bias
                both = F.linear(
                    x, experts.gate_up_proj[expert], None if bias is None else bias[expert]
                )
                outer += x.double() ** 2
                inner += experts.activation(both[:48], both[48:]).double() ** 2
            own_outer.append(outer)
            own_inner.append(inner)
        for names, own in (("gate_proj", "up_proj"), own_outer), (("down_proj",), own_inner):
            mean = sum(own, torch.zeros_like(own[0])) / max(1, sum(visits))
            for expert in range(count):
                wanted = (own[expert] + PRIOR * mean) / (visits[expert] + PRIOR)
                for of in names:
                    got = all_found[f"{at}.{of}"][expert].double()
                    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-7)


def test_the_heads_columns_count_as_the_states_that_it_is_given() -> None:
    made = whole("v3")
    states = made(read_ids(made))[0]
    torch.testing.assert_close(found(made)[1], states.square().mean(dim=0))


def packed(made: CausalLM) -> CausalLM:
    empty, state = emptied(made), made.state_dict()
    Packer("int4").pack(empty, state.__getitem__, expert_reader(state))
    return empty


def missed(made: CausalLM, rounded: CausalLM) -> float:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(made.config.vocab_size, (4, 48), generator=generator)
    exact = made.logits(made(ids))
    return float((rounded.logits(rounded(ids)) - exact).square().mean() / exact.square().mean())


@pytest.mark.skipif(not cpu.available(), reason="needs the native kernels")
@pytest.mark.parametrize("name", NETWORKS)
def test_int4_errs_less_where_it_knows_which_columns_count(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    networks = [whole(name, seed) for seed in range(3)]
    known = sum(missed(made, packed(made)) for made in networks)
    monkeypatch.setattr(network, "memory", lambda: (0, 0))
    with caplog.at_level(logging.WARNING):
        unknown = sum(missed(made, packed(made)) for made in networks)
    assert known < unknown
    assert "int4 is less exact than it could be" in caplog.text


def test_what_is_not_finite_counts_for_nothing() -> None:
    made = whole("grouped")
    made.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    all_found, of_head = found(made)
    assert all(one.isfinite().all() for one in all_found.values())
    assert "model.layers.0.mlp.down_proj.weight" in all_found
    assert "model.layers.1.mlp.down_proj.weight" not in all_found
    assert torch.equal(of_head, torch.ones_like(of_head))
