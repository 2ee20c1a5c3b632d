"""The OpenAI API as OpenAI's own client sees it."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import openai
import pytest
import torch
from small_server import PROMPT, expected, listening, served, text_of
from starlette.testclient import TestClient

from moescope.api import Model, sampling_params
from moescope.engine.sampling import Choice
from moescope.engine.sequence import Sequence
from moescope.engine.thinking import BEGIN, END
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread
from moescope.server.openai_answers import spelled
from moescope.server.templates import Templates


@pytest.fixture(scope="module")
def peer(talker: Model) -> Iterator[openai.OpenAI]:
    """OpenAI's client, at a real server with a key."""
    thread = ModelThread(talker.engine, 4, 2**24)
    api = create_api(talker, thread, name="small", access=Access("sesame"))
    with (
        listening(api) as port,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0
        ) as client,
    ):
        yield client


def test_the_model_is_listed(peer: openai.OpenAI) -> None:
    assert [model.id for model in peer.models.list()] == ["small"]
    assert peer.models.retrieve("small").owned_by == "moescope"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here"):
        peer.models.retrieve("gpt-9")


def test_a_completion_is_what_the_engine_makes(peer: openai.OpenAI, talker: Model) -> None:
    made = peer.completions.create(model="small", prompt=PROMPT, temperature=0)
    alone = expected(talker, PROMPT)
    choice = made.choices[0]
    assert choice.text == text_of(alone)
    assert choice.finish_reason == alone[-1].finish_reason
    assert made.usage is not None
    assert made.usage.completion_tokens == len(alone)
    assert made.usage.prompt_tokens == len(talker.engine.encode(PROMPT))


def test_prompts_may_be_several_and_may_be_ids(peer: openai.OpenAI, talker: Model) -> None:
    ids = talker.engine.encode(PROMPT)
    for prompt in ([PROMPT, "is it frost?"], [ids, talker.engine.encode("is it frost?")]):
        made = peer.completions.create(model="small", prompt=prompt, temperature=0, n=2)
        texts = [text_of(expected(talker, text)) for text in (PROMPT, "is it frost?")]
        assert [choice.text for choice in made.choices] == [
            *[texts[0]] * 2,
            *[texts[1]] * 2,
        ]
    made = peer.completions.create(model="small", prompt=ids, temperature=0)
    assert made.choices[0].text == texts[0]


def test_a_streamed_completion_joins_to_the_whole(peer: openai.OpenAI, talker: Model) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": PROMPT, "temperature": 0.9, "seed": 3}
    whole = peer.completions.create(**asked, n=2)
    chunks = list(
        peer.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True})
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for row, choice in enumerate(whole.choices):
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == row]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [p.finish_reason for p in pieces][-1] == choice.finish_reason
        tokens = expected(talker, PROMPT, temperature=0.9, seed=3 + row)
        assert choice.text == text_of(tokens)
    assert whole.choices[0].text != whole.choices[1].text


def test_a_chat_reads_its_template(peer: openai.OpenAI, talker: Model) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "the"}, {"type": "text", "text": " sun"}],
        },
    ]
    prompt = "s:be\nu:the sun\na:"
    asked: dict[str, Any] = {"model": "small", "messages": messages, "temperature": 0}
    params = sampling_params({"max_tokens": 9})  # greedy; a form that writes no begin gets none
    tokens = list(talker.engine.repeat([talker.tokenizer.encode(prompt)], params))
    whole = peer.chat.completions.create(**asked, max_completion_tokens=9)
    assert whole.choices[0].message.content == text_of(tokens)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(peer.chat.completions.create(**asked, max_tokens=9, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text_of(tokens)
    assert chunks[-1].choices[0].finish_reason == tokens[-1].finish_reason


def test_a_thought_is_told_apart_from_the_answer(peer: openai.OpenAI, talker: Model) -> None:
    begin, end = (talker.tokenizer.token_id(tag) for tag in (BEGIN, END))
    letters = [talker.tokenizer.encode(letter)[0] for letter in "<tis"]
    script = [begin, *letters[:3], end, *letters[2:]]
    asked: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "is"}],
        "max_tokens": len(script),
        "stop": ["ti/", "s?"],  # held back at the end of the thought and of the answer
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talker.engine, "pick", _scripted(script))
        whole = peer.chat.completions.create(**asked, n=2)
        chunks = list(
            peer.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
    for choice in whole.choices:
        assert choice.message.content == "is"
        assert choice.message.model_extra == {"reasoning_content": "<ti", "reasoning": "<ti"}
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 2 * 5
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "is"
    thoughts = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(thoughts) == "<ti"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens_details is not None
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 5


def _scripted(ids: list[int]) -> Callable[..., list[Choice]]:
    """Have each row's next tokens be the ones of a script, counted from its prompt."""
    started: dict[Sequence, int] = {}

    def pick(_logits: torch.Tensor, rows: list[Sequence]) -> list[Choice]:
        return [Choice(ids[len(r.ids) - started.setdefault(r, len(r.ids))], 0.0) for r in rows]

    return pick


def test_effort_is_told_to_the_template(talker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    render = Templates.render

    async def seen(self: Templates, messages: Any, tools: Any, variables: Any) -> str:
        told.append(variables)
        return await render(self, messages, tools, variables)

    monkeypatch.setattr(Templates, "render", seen)
    with served(talker) as (client, _):
        for effort in ("high", "none"):
            asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            answer = client.post("/v1/chat/completions", json=asked | {"reasoning_effort": effort})
            assert answer.status_code == 200
    assert [one.get("reasoning_effort") for one in told] == ["high", "none"]
    assert [one.get("enable_thinking") for one in told] == [None, False]


def test_a_chat_without_a_limit_goes_on_to_its_end(peer: openai.OpenAI) -> None:
    made = peer.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "is"}], temperature=0
    )
    assert made.usage is not None
    total = made.usage.total_tokens
    assert made.choices[0].finish_reason == "stop" or total == 64 + 1


def test_logprobs_are_the_models(peer: openai.OpenAI, talker: Model) -> None:
    tokens = expected(talker, PROMPT, max_tokens=5)
    ids = talker.engine.encode(PROMPT)
    known = talker.logits(torch.tensor([[*ids, *(t.id for t in tokens)]])).log_softmax(-1)[0]
    told = (
        peer.completions.create(
            model="small", prompt=PROMPT, temperature=0, max_tokens=5, logprobs=3
        )
        .choices[0]
        .logprobs
    )
    assert told is not None and told.token_logprobs and told.top_logprobs and told.text_offset
    for at, token in enumerate(tokens):
        here = known[len(ids) - 1 + at]
        assert told.token_logprobs[at] == pytest.approx(float(here[token.id]), abs=1e-4)
        best = sorted(told.top_logprobs[at].values(), reverse=True)
        assert best == pytest.approx(here.topk(3).values.tolist(), abs=1e-4)
        assert told.tokens is not None and told.tokens[at] in told.top_logprobs[at]
        assert told.text_offset[at] == len(text_of(tokens[:at]))
    chat = peer.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "moon"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    ).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    content = chat.logprobs.content
    made = b"".join(bytes(one.bytes or []) for one in content)
    assert made.decode(errors="replace").startswith(chat.message.content or "")
    assert all(len(one.top_logprobs) == 2 for one in content)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content)


def test_an_echo_with_logprobs_has_one_entry_for_every_token(
    peer: openai.OpenAI, talker: Model
) -> None:
    ids = [*talker.engine.encode(PROMPT), *talker.tokenizer.encode("，床😀")]
    known = talker.logits(torch.tensor([ids])).log_softmax(-1)[0]
    asked: dict[str, Any] = {"model": "small", "prompt": [ids, ids[:4]], "temperature": 0, "n": 2}
    for limit in (0, 1):
        answer = peer.completions.create(**asked, echo=True, logprobs=1, max_tokens=limit)
        assert answer.usage is not None and answer.usage.completion_tokens == 4 * limit
        for row, choice in enumerate(answer.choices):
            own, told = (ids, ids, ids[:4], ids[:4])[row], choice.logprobs
            assert told is not None and told.tokens and told.token_logprobs and told.text_offset
            assert told.top_logprobs is not None
            counts = {len(told.tokens), len(told.token_logprobs), len(told.text_offset)}
            assert counts == {len(own) + limit, len(told.top_logprobs)}
            assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
            for at in range(1, len(own)):
                here = known[at - 1]
                assert told.token_logprobs[at] == pytest.approx(float(here[own[at]]), abs=1e-4)
                best = max(told.top_logprobs[at].values())
                assert best == pytest.approx(float(here.max()), abs=1e-4)
                likeliest = int(here.argmax()) == own[at]
                assert (told.token_logprobs[at] == best) == likeliest
                assert told.tokens[at] in told.top_logprobs[at]
            assert choice.text.startswith(talker.tokenizer.decode(own))
            assert told.text_offset == sorted(told.text_offset)
            if limit == 0:
                assert choice.text == talker.tokenizer.decode(own)
                assert choice.finish_reason == "length"
    pieces = list(
        peer.completions.create(**asked, echo=True, logprobs=1, max_tokens=3, stream=True)
    )
    whole = peer.completions.create(**asked, echo=True, logprobs=1, max_tokens=3)
    for choice in whole.choices:
        own = [c for piece in pieces for c in piece.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(c.logprobs, name) for c in own if c.logprobs is not None]
            assert list(chain(*parts)) == getattr(choice.logprobs, name)


def test_an_echo_counts_an_end_token(peer: openai.OpenAI, talker: Model) -> None:
    ids = talker.engine.encode(PROMPT)
    end = max(talker.engine.end_ids)
    asked: dict[str, Any] = {"model": "small", "prompt": ids, "max_tokens": 1, "logprobs": 1}
    for echo in (False, True):
        made = peer.completions.create(**asked, echo=echo, logit_bias={str(end): 100})
        assert made.choices[0].finish_reason == "stop" and made.choices[0].logprobs is not None
        assert len(made.choices[0].logprobs.tokens or []) == (len(ids) + 1 if echo else 0)


def test_prompt_logprobs_have_the_names_and_shape_of_vllm(
    client: TestClient, talker: Model
) -> None:
    ids = talker.engine.encode(PROMPT)
    known = talker.logits(torch.tensor([ids])).log_softmax(-1)[0]
    made = client.post(
        "/v1/completions",
        json={"prompt": ids, "max_tokens": 0, "prompt_logprobs": 2, "logprobs": 0},
    ).json()
    told = made["choices"][0]["prompt_logprobs"]
    assert made["choices"][0]["text"] == "" and made["choices"][0]["logprobs"]["tokens"] == []
    messages = [{"role": "user", "content": "moon"}]
    chat = client.post(
        "/v1/chat/completions", json={"messages": messages, "prompt_logprobs": 2, "max_tokens": 2}
    ).json()
    chat_ids = talker.engine.encode_chat(messages)
    assert [entry and next(iter(entry)) for entry in chat["prompt_logprobs"]] == [
        None,
        *map(str, chat_ids[1:]),
    ]
    assert told[0] is None and len(told) == len(ids)
    for at, entry in enumerate(told[1:], start=1):
        here = known[at - 1]
        assert next(iter(entry)) == str(ids[at])
        best = {str(i) for i in here.topk(2).indices.tolist()}
        assert set(entry) == best | {str(ids[at])}
        for token_id, one in entry.items():
            assert one["logprob"] == pytest.approx(float(here[int(token_id)]), abs=1e-4)
            assert one["rank"] == int((here > here[int(token_id)]).sum()) + 1
            assert one["decoded_token"] == spelled(talker.tokenizer, int(token_id))
    refused = client.post(
        "/v1/completions", json={"prompt": "x", "prompt_logprobs": 1, "stream": True}
    )
    assert refused.status_code == 400 and "not told in streams" in refused.text


def test_a_stop_text_ends_it_and_is_left_out(peer: openai.OpenAI, talker: Model) -> None:
    whole = text_of(expected(talker, PROMPT))
    stop = whole[len(whole) // 2 :][:3]
    made = peer.completions.create(model="small", prompt=PROMPT, temperature=0, stop=stop)
    assert made.choices[0].text == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"


def test_what_was_made_is_penalised(peer: openai.OpenAI, talker: Model) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    made = peer.completions.create(
        **asked, frequency_penalty=-1.5, presence_penalty=-0.5, logprobs=0
    ).choices[0]
    ids = talker.engine.encode(PROMPT)
    prompt_tokens, logprobs = len(ids), []
    for _ in range(12):
        logits = talker.logits(torch.tensor([ids]))[0, -1]
        counts = torch.bincount(torch.tensor(ids[prompt_tokens:], dtype=torch.int64), minlength=300)
        ids.append(int((logits + 1.5 * counts + 0.5 * counts.bool()).argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        if ids[-1] == talker.tokenizer.eos_id:
            break
    assert made.text == talker.tokenizer.decode(ids[prompt_tokens:])
    assert made.logprobs is not None
    assert made.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    assert made.text != text_of(expected(talker, PROMPT, max_tokens=12))


def test_a_text_goes_on_past_its_end_where_that_is_asked_for(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = (talker.tokenizer.encode(letter)[0] for letter in "bc")
    script = [first, talker.tokenizer.eos_id or 0, last]
    asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    with served(talker) as (client, thread):
        monkeypatch.setattr(thread.engine, "pick", _scripted(script))
        for ignore_eos, text, reason in ((False, "b", "stop"), (True, "bc", "length")):
            answer = client.post("/v1/completions", json=asked | {"ignore_eos": ignore_eos})
            choice = answer.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (text, reason)


def test_a_wrong_key_is_refused_and_health_needs_none(peer: openai.OpenAI) -> None:
    with (
        pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        openai.OpenAI(base_url=peer.base_url, api_key="guess", max_retries=0) as stranger,
    ):
        stranger.models.list()


def test_what_cannot_be_done_is_said(peer: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="shorten it") as refusal:
        peer.completions.create(model="small", prompt=PROMPT * 20)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="teaches no calls of tools"):
        peer.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
