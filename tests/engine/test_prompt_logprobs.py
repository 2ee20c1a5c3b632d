"""How likely the tokens of prompts were, by the log-softmax of transformers."""

from pathlib import Path

import pytest
import torch
from packing import packed_copy
from transformers import AutoModelForCausalLM

from moescope.api import Model
from moescope.engine import prompt_logprobs, runner
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.engine.sequence import PromptLogprob, Token
from moescope.errors import UserError
from moescope.kernels import cpu

PROMPTS = ["the moon before my bed, is it frost? 床前明月光", "is", "床前明月光 the moon"]


@pytest.fixture(scope="module")
def peer(model: Model, tmp_path_factory: pytest.TempPathFactory) -> AutoModelForCausalLM:
    folder: Path = tmp_path_factory.mktemp("saved")
    model.save(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def read(
    engine: Engine, asked: list[tuple[list[int], SamplingParams]], chunk: int | None = 512
) -> list[list[Token]]:
    """Continue texts beside each other."""
    scheduler = Scheduler(engine.blocks, chunk=chunk)
    for at, (ids, params) in enumerate(asked):
        scheduler.add(engine.sequence(ids, params, at, request=at))
    made: list[list[Token]] = [[] for _ in asked]
    while scheduler:
        for _, event in engine.step(scheduler):
            assert isinstance(event, Token), event
            made[event.row].append(event)
    return made


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_they_are_those_of_transformers(
    model: Model,
    peer: AutoModelForCausalLM,
    chunk: int | None,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_logprobs, "ROWS", rows)
    asked = [
        (model.engine.encode(prompt), SamplingParams(3, prompt_logprobs=4)) for prompt in PROMPTS
    ]
    for (ids, _), tokens in zip(asked, read(model.engine, asked, chunk), strict=True):
        with torch.inference_mode():
            theirs = peer(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        known = tokens[0].prompt_logprobs
        assert known is not None and len(known) == len(ids) and known[0] is None
        assert all(token.prompt_logprobs is None for token in tokens[1:])
        for at, one in enumerate(known[1:], start=1):
            assert one is not None and one.id == ids[at]
            here = theirs[at - 1]
            assert one.logprob == pytest.approx(float(here[one.id]), abs=1e-4)
            assert one.rank == int((here > here[one.id]).sum()) + 1
            best = [logprob for _, logprob in one.top_logprobs]
            assert best == pytest.approx(here.topk(4).values.tolist(), abs=1e-4)
            assert (one.top_logprobs[0][0] == one.id) == (one.rank == 1)
            if one.rank == 1:  # who scores answers asks whether the two are the same number
                assert one.top_logprobs[0][1] == one.logprob


def test_a_text_that_was_read_before_is_read_again_and_others_may_reuse_it(model: Model) -> None:
    engine = Engine(model.network, model.tokenizer)
    engine.blocks.least_copied = 1
    ids = engine.encode(PROMPTS[0])
    plain, scored = SamplingParams(2), SamplingParams(2, prompt_logprobs=0)
    first = read(engine, [(ids, scored)])[0][0]
    scheduler = Scheduler(engine.blocks)
    again, other = engine.sequence(ids, scored, 0, 0), engine.sequence(ids, plain, 1, 1)
    scheduler.add(again)
    scheduler.add(other)
    made: dict[int, list[Token]] = {0: [], 1: []}
    while scheduler:
        for _, event in engine.step(scheduler):
            assert isinstance(event, Token)
            made[event.row].append(event)
    assert again.reused == 0 and other.reused == len(ids) - 1
    assert made[0][0].prompt_logprobs == first.prompt_logprobs
    assert [t.id for t in made[0]] == [t.id for t in made[1]]
    assert made[1][0].prompt_logprobs is None


def test_an_evicted_text_tells_each_token_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BLOCK_TOKENS", 4)
    engine = Engine(model.network, model.tokenizer)
    ids = engine.encode(PROMPTS[0])
    alone = read(engine, [(ids, SamplingParams(12, prompt_logprobs=2, ignore_eos=True))])[0]
    engine.limit_cache(runner.bytes_per_block(model.network, 4) * (len(ids) // 4 * 2 + 2))
    asked = [(ids, SamplingParams(12, prompt_logprobs=2, ignore_eos=True))] * 3
    for tokens in read(engine, asked, chunk=3):
        assert [t.id for t in tokens] == [t.id for t in alone]
        known, expected = tokens[0].prompt_logprobs, alone[0].prompt_logprobs
        assert known is not None and expected is not None and len(known) == len(ids)
        for one, other in zip(known[1:], expected[1:], strict=True):
            assert one is not None and other is not None and one.id == other.id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.skipif(not cpu.available(), reason="native kernels are not built")
def test_they_are_the_native_kernels_too_and_nobodys_text_changes(model: Model) -> None:
    native = Model("native", packed_copy(model.network), model.tokenizer)
    ids = [native.engine.encode(prompt) for prompt in PROMPTS]
    asked = [(one, SamplingParams(6, prompt_logprobs=at)) for at, one in enumerate(ids)]
    together = read(native.engine, asked)
    for one, tokens in zip(ids, together, strict=True):
        plain = read(native.engine, [(one, SamplingParams(6))])[0]
        assert [t.id for t in tokens] == [t.id for t in plain]
        theirs = native.logits(torch.tensor([one])).log_softmax(-1)[0]
        for at, told in enumerate((tokens[0].prompt_logprobs or ())[1:]):
            assert isinstance(told, PromptLogprob)
            assert told.logprob == pytest.approx(float(theirs[at, told.id]), abs=2e-2)


def test_no_more_logits_are_held_at_a_time_than_of_a_few_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    logits_of = model.network.logits
    monkeypatch.setattr(prompt_logprobs, "ROWS", 4)
    monkeypatch.setattr(
        model.network, "logits", lambda states: held.append(len(states)) or logits_of(states)
    )
    ids = model.engine.encode(PROMPTS[0])
    read(model.engine, [(ids, SamplingParams(1, prompt_logprobs=0))])
    assert max(held) == 4 and sum(held) == len(ids)


def test_what_is_no_number_is_no_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_of, first = model.network.logits, iter([True])
    monkeypatch.setattr(
        model.network,
        "logits",
        lambda states: logits_of(states) * (float("nan") if next(first, False) else 1.0),
    )
    engine, ids = Engine(model.network, model.tokenizer), model.engine.encode(PROMPTS[0])
    scheduler = Scheduler(engine.blocks)
    scheduler.add(engine.sequence(ids, SamplingParams(3, prompt_logprobs=1)))
    ((_, event),) = engine.step(scheduler)
    assert isinstance(event, UserError) and not scheduler


def test_more_than_can_be_told_is_a_sentence() -> None:
    with pytest.raises(UserError, match="prompt_logprobs is 21; it must be from 0 to 20"):
        SamplingParams(prompt_logprobs=21)
