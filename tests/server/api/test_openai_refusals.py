"""What the OpenAI API refuses, bears and breaks off."""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_server import PROMPT, listening, numbers, served
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.engine.runner import Runner
from moescope.engine.sequence import Sequence, Token
from moescope.server.apis import create_api
from moescope.server.model_thread import ModelThread
from moescope.server.openai_schema import _WITHOUT_EFFECT


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
        ("completions", {"prompt": [[65]] * 129}, 400, "129 texts at once; ask for 128"),
        ("completions", {"prompt": "x", "guided_choice": ["x" * 300_000]}, 400, "200,000 char"),
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
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
            400,
            "max_tokens is 0",
        ),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 4,
                "max_completion_tokens": 0,
            },
            400,
            "max_tokens is 0",
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


@pytest.mark.parametrize("name", sorted(_WITHOUT_EFFECT))
def test_what_would_change_the_answer_is_refused(client: TestClient, name: str) -> None:
    for path, asked in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        limited: dict[str, Any] = {**asked, "max_tokens": 1}
        refused = client.post(f"/v1/{path}", json=limited | {name: "something"})
        assert refused.status_code == 400 and f"does not know {name};" in refused.text
        for harmless in (None, *_WITHOUT_EFFECT[name]):
            assert client.post(f"/v1/{path}", json=limited | {name: harmless}).status_code == 200


def test_one_request_leaves_others_a_place_in_the_queue(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.server.texts.MAX_QUEUED_TOKENS", 20)
    asked: dict[str, Any] = {"prompt": [[65] * 5] * 3, "max_tokens": 2}
    refused = client.post("/v1/completions", json=asked)
    assert refused.status_code == 400 and "have 21 tokens to be read or made" in refused.text
    for fits in ({"prompt": [[65] * 5] * 2}, {"prompt": [65] * 30}):
        assert client.post("/v1/completions", json=asked | fits).status_code == 200


def test_a_prompt_that_no_memory_holds_is_too_long(talker: Model) -> None:
    with served(talker) as (client, thread):
        thread.engine.blocks.limit = 1
        size = thread.engine.blocks.size
        answer = client.post("/v1/completions", json={"prompt": [65] * (size + 1)})
        thread.engine.blocks.limit = None
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_all_that_fits_may_be_asked_for(client: TestClient, talker: Model) -> None:
    asked: dict[str, Any] = {"max_tokens": -1, "ignore_eos": True}
    told = {"messages": [{"role": "user", "content": "x"}]}
    for path, more in (("completions", {"prompt": [65] * 30}), ("chat/completions", told)):
        usage = client.post(f"/v1/{path}", json=asked | more).json()["usage"]
        assert usage["total_tokens"] == talker.config.max_position_embeddings + 1


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
