"""The OpenAI API as OpenAI's own client sees it, and what it refuses."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import openai
import pytest
import torch
import uvicorn
from packing import expert_reader
from questions import events_of
from starlette.testclient import TestClient

from moescope.api import Model, sampling_params
from moescope.engine.routed import RoutingRecorder
from moescope.engine.runner import Runner
from moescope.engine.sampling import Choice
from moescope.engine.sequence import Sequence, Token
from moescope.engine.thinking import BEGIN, END
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM
from moescope.native.network import Packer
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread
from moescope.server.openai_answers import spelled
from moescope.server.texts import refuse_too_much
from moescope.text.tokenizer import Tokenizer

PROMPT = "the moon before my bed"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
Client = Callable[..., TestClient]


@pytest.fixture(scope="module")
def talker(model: Model) -> Model:
    """The small model with a chat template."""
    config = {**model.tokenizer._config, "chat_template": TEMPLATE}
    return Model("small", model.network, Tokenizer(model.tokenizer._backend, config))


@contextmanager
def served(model: Model, **options: Any) -> Iterator[tuple[TestClient, ModelThread]]:
    thread = ModelThread(model.engine, options.pop("max_batch", 4), 2**24)
    api = create_api(model, thread, name="small", access=Access(**options))
    with TestClient(api, base_url="http://127.0.0.1:8000") as client:
        yield client, thread


@pytest.fixture(scope="module")
def client(talker: Model) -> Iterator[TestClient]:
    with served(talker) as (client, _):
        yield client


@pytest.fixture(scope="module")
def peer(talker: Model) -> Iterator[openai.OpenAI]:
    """OpenAI's client, at a real server with a key."""
    thread = ModelThread(talker.engine, 4, 2**24)
    api = create_api(talker, thread, name="small", access=Access("sesame"))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0
        ) as client:
            yield client
        server.should_exit = True
        thread.join()


def expected(model: Model, prompt: str, **sampling: Any) -> list[Any]:
    params = sampling_params({"max_tokens": 16, "temperature": 0.0, **sampling})
    return list(model.engine.repeat([model.engine.encode(prompt)], params))


def text_of(tokens: list[Any]) -> str:
    return "".join(token.text for token in tokens)


# --- what the client sees -------------------------------------------------------------------------


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
    client: TestClient, talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = (talker.tokenizer.encode(letter)[0] for letter in "bc")
    script = [first, talker.tokenizer.eos_id or 0, last]
    monkeypatch.setattr(talker.engine, "pick", _scripted(script))
    asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
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


# --- what else there is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "question", "status", "words"),
    [
        ("completions", {}, 400, "`prompt"),
        ("completions", {"prompt": []}, 400, "there is no prompt"),
        ("completions", {"prompt": [300]}, 400, "the prompt holds token 300"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "`temperature`"),
        ("completions", {"prompt": "x", "n": 17}, 400, "`n`"),
        ("completions", {"prompt": "x", "suffix": "y"}, 400, "does not know suffix"),
        ("completions", {"prompt": "x", "guided_regex": "("}, 400, "the expression cannot be held"),
        (
            "completions",
            {"prompt": "x", "guided_regex": "a", "response_format": {"type": "json_object"}},
            400,
            "one thing at a time",
        ),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "is no id of a token"),
        ("completions", {"prompt": "x", "num_experts_per_tok": 9}, 400, "the model has 1 to 8"),
        ("completions", {"prompt": "x", "disable_experts": [[0, 1]]}, 400, "expert 0:1 is in no"),
        ("completions", {"prompt": "x", "force_experts": [[1, 8]]}, 400, "no expert 8 in layer 1"),
        ("completions", {"prompt": "x", "force_experts": [[1]]}, 400, "force_experts"),
        (
            "completions",
            {"prompt": "x", "force_experts": [[1, 2]], "disable_experts": [[1, 2]]},
            400,
            "expert 1:2 is both disabled and forced",
        ),
        ("completions", {"prompt": "x", "stop": ["x"] * 17}, 400, "at most 16"),
        ("completions", {"prompt": ["x"] * 65, "n": 2}, 400, "130 texts at once; ask for 128"),
        ("completions", {"prompt": "x", "model": "gpt"}, 404, "ask for 'small'"),
        ("chat/completions", {"messages": []}, 400, "`messages`"),
        ("chat/completions", {"messages": [{"role": "god", "content": "x"}]}, 400, "role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "reads text alone, no part of type 'image_url'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            400,
            "set logprobs to true",
        ),
        ("images", {}, 404, "there is no /v1/images here; there are /v1/models"),
    ],
)
def test_a_mistake_is_one_sentence(
    client: TestClient, path: str, question: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post(f"/v1/{path}", json=question)
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert words in message
    assert len(message) < 300 and "\n" not in message


def test_what_has_no_effect_is_passed_over(client: TestClient) -> None:
    fields = {"user": "me", "best_of": 1, "tools": None, "logit_bias": {}, "new": 1}
    fields |= {"stop": [""], "top_p": 0, "seed": -1}
    asked = {"prompt": PROMPT, "max_tokens": 2, **fields}
    assert client.post("/v1/completions", json=asked).status_code == 200


def test_a_page_elsewhere_can_ask_nothing(client: TestClient) -> None:
    plain = client.post("/v1/completions", content='{"prompt": "x"}')
    assert plain.status_code == 415
    answer = client.get("/v1/models", headers={"host": "evil.example"})
    assert answer.status_code == 400 and "evil.example" in answer.json()["error"]["message"]
    assert client.get("/v1/completions").status_code == 405


def test_a_text_too_large_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.server.openai.MAX_BYTES", 100)
    answer = client.post("/v1/completions", json={"prompt": "x" * 200})
    assert answer.status_code == 413


def test_a_full_queue_asks_for_patience(talker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(talker) as (client, thread):
        monkeypatch.setattr(thread, "waiting_tokens", 10**6)
        answer = client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert "try again later" in answer.json()["error"]["message"]


def test_a_failure_tells_nothing_of_its_inside(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("secret")

    with served(talker) as (open_client, _):
        app = open_client.app
        client = TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False)
        monkeypatch.setattr(Runner, "run", fail)
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 500
        assert "RuntimeError" in answer.json()["error"]["message"]
        assert "secret" not in answer.text
        streamed = client.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert '"type": "server_error"' in streamed.text and "secret" not in streamed.text
        found = numbers(open_client)
    assert found['moescope_requests_total{path="/v1/completions",status="500"}'] == 1
    assert found['moescope_requests_total{path="/v1/completions",status="200"}'] == 1


def test_no_character_of_a_stream_ends_its_line(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sequence, "append", telling("a\u2028b\x85月", Sequence.append))
    with served(talker) as (client, _):
        asked = {"prompt": "x", "stream": True, "max_tokens": 2}
        lines = client.post("/v1/completions", json=asked).text.splitlines()
    *told, done = [line.removeprefix("data: ") for line in lines if line]
    events = [json.loads(event) for event in told]
    assert all(event["choices"][0]["text"] == "a\u2028b\x85月" for event in events)
    assert len(events) == 2 and done == "[DONE]"


def telling(text: str, append: Callable[..., Token]) -> Callable[..., Token]:
    return lambda row, choice: replace(append(row, choice), text=text)


def test_who_leaves_early_is_no_longer_computed_for(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = Runner.run, []

    def slow(*given: Any) -> torch.Tensor:
        made.append(1)
        time.sleep(0.05)
        return run(*given)

    monkeypatch.setattr(Runner, "run", slow)
    thread = ModelThread(talker.engine, 4, 2**24)
    api = create_api(talker, thread, name="small")
    with listening(api) as port:
        body = json.dumps({"prompt": "is", "max_tokens": 60, "temperature": 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            while not thread.running:
                time.sleep(0.005)
        deadline = time.monotonic() + 5
        while thread.running and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(made) < 55


@contextmanager
def listening(api: Any) -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


# --- experts --------------------------------------------------------------------------------------


def routing_of(model: Model, ids: list[int]) -> list[list[list[int]]]:
    """What each router chooses for each token, `[tokens, layers, top_k]`."""
    recorder = RoutingRecorder()
    with torch.inference_mode():
        model.network.model(torch.tensor([ids]), recorder=recorder)
    chosen = recorder.chosen()
    assert chosen is not None
    return chosen.ids.transpose(0, 1).tolist()


def pieces_of(client: TestClient, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, but the last, which says that it is done."""
    streamed = client.post(path, json=asked | {"stream": True}).text
    return events_of(streamed.removesuffix("data: [DONE]\n\n"))


def test_routed_experts_have_the_names_and_shape_of_vllm(client: TestClient, talker: Model) -> None:
    ids = talker.engine.encode(PROMPT)
    asked = {"prompt": ids, "max_tokens": 6, "temperature": 0, "n": 2, "moe_trace": True}
    asked |= {"return_routed_experts": True, "ignore_eos": True}
    whole = client.post("/v1/completions", json=asked).json()
    made = [token.id for token in expected(talker, PROMPT, max_tokens=6, ignore_eos=True)]
    experts = routing_of(talker, [*ids, *made[:-1]])
    assert whole["prompt_routed_experts"] == experts[: len(ids)]
    for choice in whole["choices"]:
        assert choice["routed_experts"] == experts[len(ids) :]
        trace = choice["moe_trace"]
        assert (trace["start"], trace["layers"], trace["experts"]) == (0, [1, 2], experts)
        weights, scores = torch.tensor(trace["weights"]), torch.tensor(trace["scores"])
        assert weights.shape == scores.shape == (len(experts), 2, 3) and (scores > 0).all()
        factor = talker.config.routed_scaling_factor
        normalised = scores / scores.sum(-1, keepdim=True) * factor
        torch.testing.assert_close(
            weights, normalised if talker.config.norm_topk_prob else scores * factor
        )
    pieces = pieces_of(client, "/v1/completions", asked)
    assert [p["prompt_routed_experts"] for p in pieces if "prompt_routed_experts" in p] == [
        experts[: len(ids)]
    ]
    for row in (0, 1):
        own = [c for piece in pieces for c in piece["choices"] if c["index"] == row]
        traced = [c["moe_trace"] for c in own if "moe_trace" in c]
        assert [one["start"] for one in traced] == [0, *range(len(ids), len(experts))]
        assert list(chain(*(one["experts"] for one in traced))) == experts
        assert list(chain(*(c.get("routed_experts", []) for c in own))) == experts[len(ids) :]
    several = client.post("/v1/completions", json=asked | {"prompt": [ids, ids[:3]], "n": 1}).json()
    assert [c["prompt_routed_experts"] for c in several["choices"]] == [
        experts[: len(ids)],
        experts[:3],
    ]


def test_a_chat_tells_its_experts_with_each_event(client: TestClient, talker: Model) -> None:
    messages = [{"role": "user", "content": "moon"}]
    ids = talker.engine.encode_chat(messages)
    asked = {"messages": messages, "max_tokens": 5, "temperature": 0, "moe_trace": True}
    asked |= {"return_routed_experts": True, "ignore_eos": True}
    whole = client.post("/v1/chat/completions", json=asked).json()
    choice = whole["choices"][0]
    experts = [*whole["prompt_routed_experts"], *choice["routed_experts"]]
    assert len(experts) == len(ids) + 4 and choice["moe_trace"]["experts"] == experts
    assert experts[: len(ids)] == routing_of(talker, ids)
    pieces = pieces_of(client, "/v1/chat/completions", asked)
    traced = [c["moe_trace"] for p in pieces for c in p["choices"] if "moe_trace" in c]
    assert [one["start"] for one in traced] == [0, *range(len(ids), len(ids) + 4)]
    assert list(chain(*(one["experts"] for one in traced))) == experts


def test_a_request_may_steer_the_routers_and_no_other_is_changed(
    client: TestClient, talker: Model
) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_routed_experts": True}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"num_experts_per_tok": 1}, {"num_experts_per_tok": 1}),
        ({"disable_experts": [[1, 0], [2, 3]]}, {"disabled": [(1, 0), (2, 3)]}),
        ({"force_experts": [[2, 7]]}, {"forced": [(2, 7)]}),
    ]
    texts = [text_of(list(talker.steer(**c).stream(PROMPT, max_tokens=12))) for _, c in changes]
    assert len(set(texts)) > 1
    told: dict[int, Any] = {}

    def ask(at: int) -> None:
        answer = client.post("/v1/completions", json=asked | changes[at % len(changes)][0])
        told[at] = answer.json()["choices"][0]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(3 * len(changes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == len(threads)
    for at, choice in told.items():
        assert choice["text"] == texts[at % len(changes)]
    assert {len(slots) for token in told[1]["routed_experts"] for slots in token} == {1}
    assert all(7 in token[1] for token in told[3]["routed_experts"])


def test_no_request_is_told_more_of_its_prompts_than_a_server_should_hold(model: Model) -> None:
    prompts, traced = [[5] * 1000] * 8, sampling_params({"routed_experts": True})
    scored = sampling_params({"prompt_logprobs": 20})
    refuse_too_much(model.config, prompts, [scored, traced])  # 8,000 * (21 + 3 * 3)
    for params in ([scored] * 6, [traced] * 14):
        with pytest.raises(UserError, match=r"1,008,000 numbers about its prompts; ask for 1,000"):
            refuse_too_much(model.config, prompts, params)
    with pytest.raises(UserError, match="no routed experts of which to tell"):
        dense = model.config.model_copy(update={"n_routed_experts": None})
        refuse_too_much(dense, [[5]], [traced])


def test_the_load_of_each_expert_is_counted(talker: Model) -> None:
    with served(talker) as (client, _):
        before = numbers(client)
        asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_routed_experts": True}
        told = client.post("/v1/completions", json=asked | {"ignore_eos": True}).json()
        after = numbers(client)
    experts = [*told["prompt_routed_experts"], *told["choices"][0]["routed_experts"]]
    names = [name for name in after if name.startswith("moescope_expert_tokens_total")]
    assert len(names) == 2 * 8
    for layer in (1, 2):
        for expert in range(8):
            name = f'moescope_expert_tokens_total{{expert="{expert}",layer="{layer}"}}'
            served_tokens = sum(expert in token[layer - 1] for token in experts)
            assert after[name] - before[name] == served_tokens


# --- metrics --------------------------------------------------------------------------------------


def numbers(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    found = (re.match(r"([^#\s]+(?:\{[^}]*\})?) ([0-9.e+-]+)$", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def test_tokens_and_answers_are_counted(talker: Model) -> None:
    with served(talker) as (client, _):
        for status in (200, 404):
            asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "n": 2}
            name = {200: "small", 404: "other"}[status]
            assert (
                client.post("/v1/completions", json=asked | {"model": name}).status_code == status
            )
        client.get("/nowhere/at/all")
        found = numbers(client)
    answered = 'moescope_requests_total{path="/v1/completions",status="%s"}'
    assert found[answered % 200] == found[answered % 404] == 1
    assert found['moescope_requests_total{path="other",status="404"}'] == 1
    assert found["moescope_prompt_tokens_total"] == len(talker.engine.encode(PROMPT))
    assert found["moescope_generated_tokens_total"] == 6
    assert found["moescope_time_to_first_token_seconds_count"] == 2
    assert found["moescope_time_per_output_token_seconds_count"] == 4
    assert found["moescope_request_seconds_count"] == 1
    assert found["moescope_requests_waiting"] == 0


@pytest.mark.skipif(not cpu.available(), reason="no native kernels")
def test_the_weight_bytes_read_are_what_the_routing_says(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = CausalLM(talker.config)
    network.load_state_dict(talker.network.state_dict())
    packer = Packer("int8")
    state = network.state_dict()

    packer.pack(network, lambda name: state[name], expert_reader(state))
    packed = Model("small", network, talker.tokenizer)
    ids = packed.engine.encode(PROMPT)
    trace = packed.trace(PROMPT, max_tokens=5, temperature=0.0)
    with served(packed) as (client, thread):
        thread.engine.blocks.least_copied = 1
        before = numbers(client)["moescope_weight_bytes_read_total"]
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0}
        client.post("/v1/completions", json=asked)
        middle = numbers(client)["moescope_weight_bytes_read_total"]
        # All of the prompt but its last token is known now; then five tokens are read singly.
        client.post("/v1/completions", json=asked)
        again = numbers(client)["moescope_weight_bytes_read_total"]
        client.post("/v1/completions", json=asked | {"max_tokens": 6})
        after = numbers(client)["moescope_weight_bytes_read_total"]
    assert middle - before > again - middle > 0
    singly = [token.weight_bytes for token in trace.tokens[len(ids) :]]
    assert after - again - (again - middle) == sum(singly[:5])
