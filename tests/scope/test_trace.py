from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moescope.api import Model
from moescope.errors import UserError
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.model.recorder import Recorder
from moescope.scope.trace import Trace

TEXT = "the moon before my bed 床前明月光"


@pytest.fixture(scope="module")
def trace(model: Model) -> Trace:
    return model.trace(TEXT, max_tokens=5, attention=True)


@pytest.fixture(scope="module")
def input_ids(trace: Trace) -> torch.Tensor:
    return torch.tensor([[token.id for token in trace.tokens]])


def inputs_of(model: Model, module: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What a module was given in a plain forward pass, by PyTorch's own hook: (tokens, hidden)."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.logits(input_ids)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_tokens_are_the_prompt_and_what_generate_makes_of_it(model: Model, trace: Trace) -> None:
    made = [token.id for token in model.generate(TEXT, max_tokens=5).tokens]
    assert [token.id for token in trace.tokens] == model.engine.encode(TEXT) + made
    assert trace.prompt_tokens == len(trace.tokens) - 5
    assert [layer.router is not None for layer in trace.layers] == [False, True, True]


def test_scores_choice_and_weights_follow_the_papers_formula(
    model: Model, trace: Trace, input_ids: torch.Tensor
) -> None:
    """DeepSeek-V3, eq. 12-16, in float64, on the router's input as a hook sees it."""
    for layer_idx in (1, 2):
        gate: Any = model.network.model.layers[layer_idx].mlp.gate
        hidden_states = inputs_of(model, gate, input_ids)
        scores = (hidden_states.double() @ gate.weight.double().T).sigmoid()
        router = trace.layers[layer_idx].router
        assert router is not None
        torch.testing.assert_close(torch.tensor(router.scores).double(), scores, rtol=0, atol=1e-5)
        for token, (ids, weights) in enumerate(
            zip(router.topk_ids, router.topk_weights, strict=True)
        ):
            best = scores[token].topk(3)
            assert ids == best.indices.tolist()
            expected = best.values / best.values.sum() * 2.5
            torch.testing.assert_close(torch.tensor(weights).double(), expected, rtol=0, atol=1e-5)
        assert sum(router.load) == 3 * len(trace.tokens)
        assert router.load == [
            Counter(e for ids in router.topk_ids for e in ids)[e] for e in range(8)
        ]


def test_the_last_layers_guesses_are_the_models_own(
    model: Model, trace: Trace, input_ids: torch.Tensor
) -> None:
    probabilities = model.logits(input_ids)[0].softmax(dim=-1)
    for row, candidates in zip(probabilities, trace.guesses, strict=True):
        best = row.topk(5)
        assert [c.id for c in candidates] == best.indices.tolist()
        assert [c.probability for c in candidates] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [c.text for c in candidates] == [
            model.tokenizer.decode([c.id], skip_special_tokens=False) for c in candidates
        ]


def test_an_earlier_layers_guesses_are_its_residual_stream_through_norm_and_head(
    model: Model, trace: Trace, input_ids: torch.Tensor
) -> None:
    stream = inputs_of(model, model.network.model.layers[2], input_ids).double()
    assert trace.layers[1].hidden_norm == pytest.approx(stream.norm(dim=-1).tolist(), rel=1e-4)
    normed = stream * (stream.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    logits = (normed * model.network.model.norm.weight) @ model.network.lm_head.weight.double().T
    best = logits.softmax(dim=-1).topk(5).indices.tolist()
    assert [[c.id for c in guesses] for guesses in trace.layers[1].guesses] == best


def test_every_token_used_all_but_the_experts_not_chosen(model: Model, trace: Trace) -> None:
    """By hand: an expert holds three 32 x 16 matrices; 2 layers leave 5 of 8 experts idle."""
    total = sum(parameter.numel() for parameter in model.network.parameters())
    assert trace.total_parameters == total
    assert {token.parameters_used for token in trace.tokens} == {total - 2 * 5 * 3 * 32 * 16}


def test_shared_share_compares_the_lengths_of_two_outputs(
    model: Model, trace: Trace, input_ids: torch.Tensor
) -> None:
    moe: Any = model.network.model.layers[1].mlp
    tokens = inputs_of(model, moe, input_ids)
    with torch.inference_mode():
        shared = moe.shared_experts(tokens).norm(dim=-1)
        routed = (moe(tokens[None], input_ids)[0] - moe.shared_experts(tokens)).norm(dim=-1)
    router = trace.layers[1].router
    assert router is not None
    assert router.shared_share == pytest.approx((shared / (shared + routed)).tolist(), rel=1e-3)


def test_attention_is_causal_and_sums_to_one(trace: Trace) -> None:
    for layer in trace.layers:
        attention = torch.tensor(layer.attention)  # (heads, tokens, tokens)
        assert attention.shape == (2, len(trace.tokens), len(trace.tokens))
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:2]))
        assert not attention.triu(1).any()


def test_attention_is_left_out_unless_asked_for(model: Model) -> None:
    assert all(layer.attention is None for layer in model.trace(TEXT).layers)


def test_a_trace_survives_json(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    assert Trace.from_file(tmp_path / "trace.json") == trace


def test_what_is_no_trace_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="this is no trace: "):
        Trace.from_file(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot read a trace from"):
        Trace.from_file(tmp_path / "absent.json")


class Operations(TorchDispatchMode):
    """Counts every operation that PyTorch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_tracing_costs_no_operation_when_off_and_changes_no_bit_when_on(
    model: Model, input_ids: torch.Tensor
) -> None:
    before = model.logits(input_ids)
    with torch.inference_mode(), Operations() as off:
        model.network(input_ids)
    with torch.inference_mode(), Operations() as watched:
        model.network(input_ids, recorder=Recorder())
    model.trace(TEXT, max_tokens=3, attention=True)
    assert off.counts and off.counts == watched.counts
    assert torch.equal(model.logits(input_ids), before)


@pytest.mark.parametrize("topk_method", ["relu", "expert_choice"])
def test_routers_with_uneven_choices_are_counted_token_by_token(
    model: Model, topk_method: str
) -> None:
    fields = {**config_fields(model.config), "topk_method": topk_method}
    network = CausalLM(read_config(fields))
    initialise(network, seed=1)
    for name, buffer in network.named_buffers():
        if name.endswith("score_threshold"):
            buffer.fill_(1 / 8)
    traced = Model("other", network, model.tokenizer).trace(TEXT)
    total = sum(parameter.numel() for parameter in network.parameters())
    for at, token in enumerate(traced.tokens):
        chosen = sum(len(layer.router.topk_ids[at]) for layer in traced.layers if layer.router)
        assert token.parameters_used == total - (16 - chosen) * 3 * 32 * 16
    assert len({token.parameters_used for token in traced.tokens}) > 1


def test_a_dense_model_has_no_routers_and_uses_everything(model: Model) -> None:
    fields = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    network = CausalLM(read_config(fields))
    initialise(network, seed=0)
    traced = Model("dense", network, model.tokenizer).trace(TEXT)
    assert all(layer.router is None for layer in traced.layers)
    assert {token.parameters_used for token in traced.tokens} == {traced.total_parameters}
