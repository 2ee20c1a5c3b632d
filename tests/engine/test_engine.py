from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM

from moescope.api import Model, load
from moescope.engine import runner
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.errors import UserError
from moescope.scope.parts import Parts
from moescope.scope.steps import TokenStep, stream

PROMPTS = ["床前", "the moon before my bed, is it frost? 床前明月光", "😀", "is"]


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder)
    return folder


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_what_transformers_generates(model: Model, saved: Path, prompt: str) -> None:
    peer = AutoModelForCausalLM.from_pretrained(saved)
    prompt_ids = model.engine.encode(prompt)
    ids = torch.tensor([prompt_ids])
    expected = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )[0, len(prompt_ids) :].tolist()
    assert [token.id for token in model.generate(prompt, max_tokens=20).tokens] == expected


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_nothing_is_seen_of_what_blocks_held_before(saved: Path, backend: str) -> None:
    engine = load(str(saved), backend=backend).engine
    engine.limit_cache(2**20)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    made = [engine.generate(PROMPTS, params)]
    with torch.inference_mode():
        for held in engine.runner.pool._tensors():
            held[1:] = torch.nan
    engine.blocks.forget()
    made.append(engine.generate(PROMPTS, params))
    assert made[0] == made[1]


def test_texts_of_a_cache_that_was_replaced_are_not_read_from_another(saved: Path) -> None:
    engine = load(str(saved)).engine
    tokens = engine.repeat([engine.encode(PROMPTS[0])], SamplingParams(max_tokens=9))
    next(tokens)
    engine.limit_cache(2**20)
    with pytest.raises(ValueError, match="replaced"):
        next(tokens)


@pytest.mark.parametrize("chunk", [None, 3])
def test_what_gives_up_its_memory_is_shown_once(
    model: Model, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BLOCK_TOKENS", 8)
    engine = Engine(model.network, model.tokenizer)
    engine.limit_cache(4 * runner.bytes_per_block(model.network, 8))
    ids, params = [65] * 10, SamplingParams(max_tokens=14, temperature=0)
    undisturbed = list(stream(engine, ids, params))
    others, waits = Scheduler(engine.blocks), 0

    def pause() -> None:
        nonlocal waits
        waits += bool(others)
        if waits == 30:
            others.clear()

    told = []
    for step in stream(engine, ids, params, parts=Parts(tokens=chunk, pause=pause)):
        told.append(step)
        if len(told) == 12:  # of two blocks, and two are left
            others.add(engine.sequence([66] * 12, params, request="other"))
            engine.step(others)
    assert waits == 30  # it had to wait, and was read again
    assert [getattr(step, "id", None) for step in told] == [
        getattr(step, "id", None) for step in undisturbed
    ]
    for mine, its in zip(told[:-1], undisturbed[:-1], strict=True):
        assert isinstance(mine, TokenStep) and isinstance(its, TokenStep)
        assert (mine.index, mine.logprob) == (its.index, pytest.approx(its.logprob, abs=1e-4))
        experts = [layer and layer.topk_ids for layer in mine.layers]
        assert experts == [layer and layer.topk_ids for layer in its.layers]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(
    model: Model, temperature: float
) -> None:
    sampling = {"max_tokens": 24, "temperature": temperature, "seed": 5}
    together = model.generate(PROMPTS, **sampling)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        alone = model.generate(prompt, **sampling)
        assert generation.text == alone.text
        assert [t.id for t in generation.tokens] == [t.id for t in alone.tokens]
        assert generation.prompt_tokens == len(model.engine.encode(prompt))


def test_logprobs_are_those_of_a_forward_pass_over_everything(model: Model) -> None:
    generation = model.generate(PROMPTS[1], max_tokens=12)
    prompt_ids = model.engine.encode(PROMPTS[1])
    ids = [*prompt_ids, *(token.id for token in generation.tokens)]
    logprobs = model.logits(torch.tensor([ids])).double().log_softmax(dim=-1)[0]
    for at, token in enumerate(generation.tokens, start=len(prompt_ids)):
        assert token.logprob == pytest.approx(float(logprobs[at - 1, token.id]), abs=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(PROMPTS))
def test_streamed_pieces_join_to_the_text_and_cut_no_character(
    model: Model, seed: int, prompt: str
) -> None:
    sampling = {"max_tokens": 20, "temperature": 2.0, "seed": seed}
    tokens = list(model.stream(prompt, **sampling))
    generation = model.generate(prompt, **sampling)
    ids = [token.id for token in tokens if token.id not in model.engine.end_ids]
    assert "".join(token.text for token in tokens) == generation.text
    assert generation.text == model.tokenizer.decode(ids)
    assert [t.finish_reason for t in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason in ("stop", "length")


def test_the_seed_decides_the_text(model: Model) -> None:
    texts = [model.generate("is", temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_the_continuation_and_is_left_out(model: Model) -> None:
    whole = model.generate("the moon", max_tokens=24).text
    stop = whole[len(whole) // 2 :][:3]
    generation = model.generate("the moon", max_tokens=24, stop=[stop])
    assert generation.finish_reason == "stop"
    assert generation.text == whole[: whole.index(stop)]


def test_a_stop_token_ends_the_continuation(model: Model) -> None:
    made = model.generate("the moon", max_tokens=9).tokens
    last = made[4].id
    first = [token.id for token in made].index(last)
    generation = model.generate("the moon", max_tokens=9, stop_token_ids=[last])
    assert generation.finish_reason == "stop"
    assert len(generation.tokens) == first + 1


def test_the_context_ends_a_continuation(model: Model) -> None:
    generation = model.generate("the moon", max_tokens=1000)
    assert generation.prompt_tokens + len(generation.tokens) == 64 + 1
    assert generation.finish_reason == "length"


def test_no_tokens_asked_for_are_no_tokens_made(model: Model) -> None:
    generation = model.generate("the moon", max_tokens=0)
    assert (generation.text, generation.tokens, generation.finish_reason) == ("", (), "length")


def test_a_prompt_that_fills_more_than_the_context_is_a_sentence(model: Model) -> None:
    with pytest.raises(UserError, match=r"context holds 64; shorten"):
        model.generate("the moon " * 100)


def test_an_unknown_sampling_field_is_a_sentence(model: Model) -> None:
    with pytest.raises(UserError, match="there is no sampling field 'temprature'"):
        model.generate("the moon", temprature=1)


def test_no_weight_changes_and_nothing_is_kept_between_prompts(model: Model) -> None:
    first = model.generate("the moon", max_tokens=8).text
    model.generate("床前明月光", max_tokens=8)
    assert model.generate("the moon", max_tokens=8).text == first
