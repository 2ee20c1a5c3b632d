"""Steps against the engine: the same ids, and the numbers of a plain forward pass."""

from typing import Any

import pytest
import torch

from moescope.api import Model, sampling_params
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.detail import Reading
from moescope.scope.parts import Parts
from moescope.scope.recording import record
from moescope.scope.steps import End, TokenStep, read, stream

TEXT = "the moon before my bed 床前明月光"
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.5, "seed": 3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 1, "min_p": 0.05},
]
STEERINGS: list[dict[str, Any]] = [
    {},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 8, "noise": 0.5, "disabled": {(1, 3)}},
    {"rule": "relu", "forced": {(2, 4)}},
]


def streamed(model: Model, ids: list[int], **sampling: Any) -> tuple[list[TokenStep], End]:
    *steps, end = stream(model.engine, ids, sampling_params(sampling))
    assert isinstance(end, End) and all(isinstance(step, TokenStep) for step in steps)
    return steps, end  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("steering", "sampling"), list(zip(STEERINGS, SAMPLINGS, strict=True)))
def test_a_stream_makes_what_generate_makes(
    model: Model, steering: dict[str, Any], sampling: dict[str, Any]
) -> None:
    steered = model.steer(**steering)
    ids = model.engine.encode(TEXT)
    steps, end = streamed(steered, ids, max_tokens=20, **sampling)
    generation = steered.generate(TEXT, max_tokens=20, **sampling)
    assert [step.id for step in steps] == ids + [token.id for token in generation.tokens]
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.in_prompt for step in steps].count(True) == len(ids) == end.prompt_tokens
    made = [step.logprob for step in steps[len(ids) :]]
    expected = [token.logprob for token in generation.tokens]
    assert made == pytest.approx(expected, rel=1e-5)
    assert (end.finish_reason, end.new_tokens) == (generation.finish_reason, len(made))


@pytest.mark.parametrize("steering", STEERINGS)
def test_steps_tell_the_numbers_of_a_plain_forward_pass(
    model: Model, steering: dict[str, Any]
) -> None:
    steered = model.steer(**steering)
    steps, _ = streamed(steered, model.engine.encode(TEXT), max_tokens=8)
    ids = [step.id for step in steps]
    logprobs = steered.logits(torch.tensor([ids]))[0].log_softmax(dim=-1)
    trace = record("small", steered.network, model.tokenizer, ids, len(ids))
    assert steps[0].logprob is None
    for step, token in zip(steps, trace.tokens, strict=True):
        best = logprobs[step.index].exp().topk(10)
        probabilities = torch.tensor([c.probability for c in step.candidates])
        torch.testing.assert_close(probabilities, best.values, rtol=1e-4, atol=1e-6)
        assert [c.id for c in step.candidates] == best.indices.tolist()
        assert (step.text, step.parameters_used) == (token.text, token.parameters_used)
        if step.logprob is not None:
            expected = float(logprobs[step.index - 1, step.id])
            assert step.logprob == pytest.approx(expected, abs=1e-4)
        for layer, mine in zip(trace.layers, step.layers, strict=True):
            if layer.router is None:
                assert mine is None
                continue
            assert mine is not None
            assert mine.topk_ids == layer.router.topk_ids[step.index]
            assert mine.topk_weights == pytest.approx(
                layer.router.topk_weights[step.index], rel=1e-3, abs=1e-4
            )
            assert mine.shared_share == pytest.approx(
                layer.router.shared_share[step.index], rel=1e-4
            )


@pytest.mark.parametrize(("tokens", "at_once"), [(None, 1), (None, 3), (None, 256), (5, 2), (1, 9)])
def test_known_tokens_are_read_and_not_told(model: Model, tokens: int | None, at_once: int) -> None:
    pauses: list[None] = []
    parts = Parts(tokens, at_once, lambda: pauses.append(None))
    ids = model.engine.encode(TEXT)
    whole = [*stream(model.engine, ids, sampling_params({"max_tokens": 5}))]
    for known in (0, 1, 2, len(ids) - 1, len(ids), len(ids) + 2):
        told = [*stream(model.engine, ids, sampling_params({"max_tokens": 5}), known, parts)]
        for step, same in zip(told[:-1], whole[known:-1], strict=True):
            assert isinstance(step, TokenStep) and isinstance(same, TokenStep)
            assert step.logprob == (same.logprob and pytest.approx(same.logprob, rel=1e-5))
            assert (step.index, step.id) == (same.index, same.id)
            for layer, other in zip(step.layers, same.layers, strict=True):
                assert (layer and layer.topk_ids) == (other and other.topk_ids)
    assert len(pauses) > 6 * (5 + len(ids) // (tokens or len(ids)))


def test_reading_all_at_once_tells_the_same(model: Model) -> None:
    steps, _ = streamed(model, model.engine.encode(TEXT), max_tokens=0)
    assert read(model.engine, [step.id for step in steps]) == steps


@pytest.mark.parametrize("parts", [Parts(rows=3), Parts(tokens=4), Parts(tokens=1, rows=1)])
def test_long_texts_are_read_and_described_in_parts(model: Model, parts: Parts) -> None:
    ids = model.engine.encode(TEXT)
    whole = read(model.engine, ids)
    for part, step in zip(Reading(model.engine, ids, parts).steps(), whole, strict=True):
        assert part.logprob == (step.logprob and pytest.approx(step.logprob, rel=1e-5))
        for layer, other in zip(part.layers, step.layers, strict=True):
            assert (layer and layer.topk_ids) == (other and other.topk_ids)


def test_a_stream_ends_at_the_end_token_and_describes_it(model: Model) -> None:
    sampling = {"temperature": 3.0, "max_tokens": 40}
    for seed in range(300):
        generation = model.generate("is", seed=seed, **sampling)
        if generation.finish_reason == "stop":
            break
    steps, end = streamed(model, model.engine.encode("is"), seed=seed, **sampling)
    assert end.finish_reason == "stop" and end.new_tokens == len(generation.tokens)
    assert steps[-1].special and steps[-1].id == model.tokenizer.eos_id
    assert steps[-1].logprob == pytest.approx(generation.tokens[-1].logprob, rel=1e-4)
    assert steps[-1].layers[1] is not None and len(steps[-1].candidates) == 10


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_stream_ends_where_the_context_does(model: Model, left: int) -> None:
    ids = (model.engine.encode(TEXT) * 8)[: 64 - left]
    steps, end = streamed(model, ids, max_tokens=10)
    assert (len(steps), end.new_tokens, end.finish_reason) == (64, left, "length")


def test_bytes_spell_a_character_in_pieces(model: Model) -> None:
    steps, _ = streamed(model, model.engine.encode("月😀"), max_tokens=0)
    assert bytes(b for step in steps[1:] for b in step.bytes).decode() == "月😀"
    assert steps[0].special and not any(step.special for step in steps[1:])
    assert any("�" in step.text for step in steps[1:])


def test_a_dense_model_has_no_layer_steps(model: Model) -> None:
    config = read_config(config_fields(model.config) | {"n_routed_experts": None})
    network = CausalLM(config)
    initialise(network, 0)
    dense = Model("dense", network, model.tokenizer)
    steps, _ = streamed(dense, dense.engine.encode(TEXT), max_tokens=2)
    assert steps[-1].layers == [None, None, None]
