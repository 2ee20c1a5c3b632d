"""One token taken apart, against plain forward passes and sums written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moescope.api import Model, sampling_params
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.detail import Reading
from moescope.scope.steps import read

TEXT = "the moon before my bed 床前明月光"
GREEDY = SamplingParams()


def reading_of(model: Model, **steering: Any) -> Reading:
    return Reading(model.steer(**steering).engine, model.engine.encode(TEXT))


@pytest.fixture(scope="module")
def reading(model: Model) -> Reading:
    return reading_of(model)


def test_streams_attention_and_guesses_are_the_traces(model: Model, reading: Reading) -> None:
    trace = model.trace(TEXT, attention=True)
    for layer_idx, layer in enumerate(trace.layers):
        detail = reading.token(6, layer_idx, GREEDY)
        assert detail.hidden_norms[0] == pytest.approx(trace.embedding_norm[6])
        assert detail.hidden_norms[layer_idx + 1] == pytest.approx(layer.hidden_norm[6])
        assert layer.attention is not None
        heads = torch.tensor(layer.attention)[:, 6, :7]
        torch.testing.assert_close(torch.tensor(detail.attention.heads), heads)
        torch.testing.assert_close(torch.tensor(detail.attention.mean), heads.mean(dim=0))
        assert [c.id for c in detail.lens[layer_idx]] == [c.id for c in layer.guesses[6]]
        assert (detail.router is None) == (layer.router is None) == (detail.merge is None)
    assert detail.embedding == model.network.model.embed_tokens.weight[reading.ids[6]].tolist()


@pytest.mark.parametrize("steering", [{}, {"rule": "relu"}, {"rule": "random", "noise": 0.3}])
def test_a_longer_text_goes_on_from_a_shorter(model: Model, steering: dict[str, Any]) -> None:
    engine, ids = model.steer(**steering).engine, model.engine.encode(TEXT)
    grown = Reading(engine, ids[:3])
    for length in range(4, len(ids) + 1):
        grown = Reading(engine, ids[:length], begun=grown)
    for step, same in zip(grown.steps(), read(engine, ids), strict=True):
        for layer, expected in zip(step.layers, same.layers, strict=True):
            assert (layer and layer.topk_ids) == (expected and expected.topk_ids)
        assert step.logprob == (same.logprob and pytest.approx(same.logprob, rel=1e-4))


@pytest.mark.parametrize(
    "steering",
    [
        {},
        {"num_experts_per_tok": 8, "without_bias": True, "disabled": {(1, 2)}},
        {"rule": "softmax", "noise": 0.4, "bias": {(1, 5): 0.3}, "forced": {(1, 0)}},
        {"rule": "relu"},
    ],
)
def test_the_router_chose_what_its_scores_say(model: Model, steering: dict[str, Any]) -> None:
    reading = reading_of(model, **steering)
    steps = read(model.steer(**steering).engine, reading.ids)
    for index in range(len(reading.ids)):
        router = reading.token(index, 1, GREEDY).router
        assert router is not None
        step = steps[index].layers[1]
        assert step is not None
        assert (router.topk_ids, router.topk_weights) == (step.topk_ids, step.topk_weights)
        forced = {expert for _, expert in steering.get("forced", ())}
        open_to_choice = {e: s for e, s in enumerate(router.choice_scores) if s is not None}
        by_score = sorted(open_to_choice, key=lambda e: -open_to_choice[e])
        free = [expert for expert in by_score if expert not in forced]
        k = len(router.topk_ids)
        assert set(router.topk_ids) == forced | set(free[: k - len(forced)])
        assert all(
            open_to_choice[e] >= router.threshold for e in router.topk_ids if e not in forced
        )
        if "disabled" in steering:
            assert router.choice_scores[2] is None and router.scores[2] == 0 and k == 7
        if steering.get("rule") != "relu":
            for expert, score in open_to_choice.items():
                assert score == pytest.approx(router.scores[expert] + router.bias[expert])
    assert router.bias[5] == pytest.approx(0.3 if "bias" in steering else 0.0)


def test_contributions_add_up_to_what_the_layer_added(model: Model, reading: Reading) -> None:
    seen: list[torch.Tensor] = []
    for layer_idx in (1, 2):
        merge = reading.token(4, layer_idx, GREEDY).merge
        assert merge is not None
        assert [c.expert is None for c in merge.contributions] == [False, False, False, True]
        total = sum(c.projection for c in merge.contributions)
        assert total == pytest.approx(merge.output_norm, rel=1e-5)
        layer: Any = model.network.model.layers[layer_idx]
        hook = layer.mlp.register_forward_hook(lambda *given: seen.append(given[2][0, 4]))
        model.logits(torch.tensor([reading.ids]))
        hook.remove()
        assert merge.output_norm == pytest.approx(float(seen[-1].norm()), rel=1e-5)
        weights = [c.weight for c in merge.contributions[:-1]]
        assert weights == sorted(weights, reverse=True)
        assert merge.contributions[-1].weight == 1


def test_an_expert_at_work_gives_its_contribution(reading: Reading) -> None:
    merge = reading.token(4, 2, GREEDY).merge
    assert merge is not None
    for part in merge.contributions[:-1]:
        assert part.expert is not None
        work = reading.expert(4, 2, part.expert)
        output = torch.tensor(work.output)
        assert float(output.norm()) * part.weight == pytest.approx(part.norm, rel=1e-4)
        expected = F.silu(torch.tensor(work.gate)) * torch.tensor(work.up)
        torch.testing.assert_close(torch.tensor(work.activated), expected)
        assert (len(work.gate), len(work.output)) == (16, 32)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_other_families_are_taken_apart_by_their_own_rules(model: Model, family: str) -> None:
    """Multipliers, biases and another activation: what is shown adds up to what the layer did."""
    fields = {
        "model_type": family,
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "initializer_range": 0.3,
    }
    network = CausalLM(read_config(fields)).eval().requires_grad_(False)
    initialise(network, seed=0)
    for name, parameter in network.named_parameters():
        if name.endswith("_proj_bias"):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    other = Model(family, network, model.tokenizer)
    reading = reading_of(other)
    detail = reading.token(5, 1, GREEDY)
    assert detail.merge is not None
    seen: list[torch.Tensor] = []
    layer: Any = network.model.layers[1]
    hook = layer.mlp.register_forward_hook(lambda *given: seen.append(given[2][0, 5]))
    other.logits(torch.tensor([reading.ids]))
    hook.remove()
    assert detail.merge.output_norm == pytest.approx(float(seen[-1].norm()), rel=1e-5)
    for part in detail.merge.contributions:
        assert part.expert is not None
        alone = torch.tensor(reading.expert(5, 1, part.expert).output)
        assert float(alone.norm()) * part.weight == pytest.approx(part.norm, rel=1e-4)


def test_a_layer_whose_router_chose_nobody_is_only_shared(model: Model) -> None:
    reading = reading_of(model, rule="relu", bias={(1, expert): -1e9 for expert in range(8)})
    merge = reading.token(3, 1, GREEDY).merge
    assert merge is not None and [c.expert for c in merge.contributions] == [None]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_k": 5, "seed": 4}, {"repetition_penalty": 1.7}]
)
def test_candidates_and_pick_are_the_engines(model: Model, sampling: dict[str, Any]) -> None:
    reading = reading_of(model)
    last = len(reading.ids) - 1
    detail = reading.token(last, 0, sampling_params(sampling))
    made = model.generate(TEXT, max_tokens=1, **sampling).tokens[0]
    assert detail.picked == made.id
    logits = model.logits(torch.tensor([reading.ids]))[0, -1]
    best = logits.topk(40)
    assert [c.id for c in detail.candidates] == best.indices.tolist()
    assert [c.logit for c in detail.candidates] == pytest.approx(best.values.tolist(), rel=1e-4)
    expected = logits.softmax(dim=-1)[best.indices].tolist()
    assert [c.probability for c in detail.candidates] == pytest.approx(expected, rel=1e-4)
    left = [c.id for c in detail.candidates if c.filtered_probability > 0]
    assert made.id in left
    if "top_k" in sampling:
        assert len(left) == 5
    if not sampling:
        assert left == [made.id] and detail.candidates[0].filtered_probability == 1


def test_neighbours_are_the_embeddings_of_the_smallest_angle(
    model: Model, reading: Reading
) -> None:
    table = F.normalize(model.network.model.embed_tokens.weight.detach(), dim=-1)
    cosines = table @ table[reading.ids[3]]
    best = cosines.argsort(descending=True)[1:9]
    found = reading.token(3, 0, GREEDY).neighbours
    assert [n.id for n in found] == best.tolist()
    assert [n.similarity for n in found] == pytest.approx(cosines[best].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda r: r.token(99, 0, GREEDY), "there is no token 99; the text has 0 to"),
        (lambda r: r.token(0, 3, GREEDY), "there is no layer 3; the model has 0 to 2"),
        (lambda r: r.expert(0, 0, 1), "layer 0 is dense; it has no routed experts"),
        (lambda r: r.expert(0, 1, 8), "there is no expert 8; layer 1 has experts 0 to 7"),
    ],
)
def test_mistakes_are_sentences(
    reading: Reading, ask: Callable[[Reading], object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        ask(reading)


@pytest.mark.parametrize("ids", [[], [300], [-1], [5] * 65])
def test_ids_that_are_no_text_are_refused(model: Model, ids: list[int]) -> None:
    with pytest.raises(UserError, match="the prompt"):
        Reading(model.engine, ids)
