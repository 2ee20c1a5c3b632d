"""The page inside a server: what it shows of the traffic, to whom, and at whose expense."""

import http.client
import json
import re
import time
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import ask, process, said, save_tool_caller
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.engine.sampling import SamplingParams
from moescope.engine.sequence import Token
from moescope.scope.steps import read
from moescope.server import traffic as traffic_module
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread
from moescope.server.requests import NotThere
from moescope.server.traffic import MAX_PICTURE, MAX_REQUESTS, MAX_SHOWN, MAX_TEXTS, Traffic

PROMPT = "the moon before my bed 床前明月光"
GREEDY = {"temperature": 0, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


@contextmanager
def served(model: Model, *, watch: bool = True, **access: Any) -> Iterator[TestClient]:
    thread = ModelThread(Model("small", model.network, model.tokenizer).engine, 4, 2**24)
    api = create_api(model, thread, name="small", access=Access(**access), watch=watch)
    with TestClient(api, base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@contextmanager
def following(port: int, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """What `/page/api/traffic` tells, event by event."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/page/api/traffic", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200

        def events() -> Iterator[dict[str, Any]]:
            while line := answer.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

        yield events()


def until(events: Iterator[dict[str, Any]], state: str) -> dict[str, Any]:
    """The first request that is told to be in a state."""
    for event in events:
        for request in event["requests"]:
            if request["state"] == state:
                return request
    pytest.fail(f"no request was {state}")


@pytest.fixture(scope="module")
def talker(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("talker") / "small"
    save_tool_caller(model, home, positions=4096)
    return home


def test_the_list_follows_requests_from_arrival_to_end(talker: Path) -> None:
    """A real process: one answer ends, one client hangs up, one waits for its turn."""
    with process(talker, "--watch", "--max-batch", "1", "--grace", "60") as (server, port):
        with following(port) as events:
            assert next(events) == {"type": "traffic", "requests": [], "oldest": 1}
            chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, **GREEDY}
            ask(port, "/v1/chat/completions", chat)
            ended = until(events, "ended")
            assert (ended["path"], ended["new_tokens"]) == ("/v1/chat/completions", 5)
            assert ended["tokens_per_second"] > 0 and abs(ended["came"] - time.time()) < 60
            assert PROMPT in ended["texts"][0]["prompt"]
            long = {"prompt": PROMPT, "max_tokens": 3900, "stream": True, **GREEDY}
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as first:
                first.request("POST", "/v1/completions", json.dumps(long), JSON)
                assert first.getresponse().readline().startswith(b"data: ")
                assert until(events, "running")["path"] == "/v1/completions"
                opened = ask(port, "/page/api/answer", {"number": ended["number"]})
                steps = ask(port, "/page/api/trace", {"ids": opened["ids"]})["steps"]
                assert [step["id"] for step in steps] == opened["ids"]  # while the other runs
            cancelled = until(events, "cancelled")
            assert 0 < cancelled["new_tokens"] < 3900
        with following(port) as again:
            states = {r["number"]: r["state"] for r in next(again)["requests"]}
            assert states == {ended["number"]: "ended", cancelled["number"]: "cancelled"}
            server.terminate()  # a list that is looked at keeps no server from ending
            begun = time.monotonic()
            assert server.wait(timeout=60) in (0, -15)
            assert time.monotonic() - begun < 20 and said(server) == ""
            server.returncode = 0


def test_without_the_key_nothing_of_the_traffic_is_seen(model: Model) -> None:
    key = {"Authorization": "Bearer sesame"}
    with served(model, api_key="sesame") as client:
        asked = client.post(
            "/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers=key
        )
        assert asked.status_code == 200
        shown = client.get("/page/")
        assert shown.status_code in (200, 503) and PROMPT not in shown.text  # built or not
        assert client.get("/").headers["location"] == "/page/"
        assert client.get("/page/index.html").status_code == 401  # it is /page/
        for path in ("traffic", "model", "answer", "trace", "nothing", "../api/model"):
            for way in ("/page/api/", "/page//api/", "/page/assets/../api/", "/page/assets%2F/"):
                for how in ("GET", "POST"):
                    refused = client.request(how, way + path, json={"number": 1})
                    assert refused.status_code in (401, 404, 405), (how, way + path)
                    assert PROMPT not in refused.text and '"ids"' not in refused.text
        refused = client.post(
            "/page/api/answer", json={"number": 1}, headers={"prefer": "status=200"}
        )
        assert refused.status_code == 200 and refused.json()["code"] == "no_key"
        told = client.post("/page/api/answer", json={"number": 1}, headers=key)
        assert told.status_code == 200 and told.json()["prompt"] == PROMPT


def test_nobody_is_watched_unless_the_server_was_told_to(model: Model) -> None:
    with served(model, watch=False) as client:
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
        assert client.get("/page/api/model").json()["traffic"] is False
        for refused in (
            client.get("/page/api/traffic"),
            client.post("/page/api/answer", json={"number": 1}),
        ):
            assert refused.status_code == 404 and "--watch" in refused.json()["message"]


def test_pages_of_other_origins_may_ask_the_model_and_see_no_traffic(model: Model) -> None:
    origin = {"Origin": "https://example.org"}
    with served(model, origins=["*"]) as client:
        assert "access-control-allow-origin" in client.get("/v1/models", headers=origin).headers
        for path in ("/page/api/model", "/page/api/answer", "/page/"):
            assert "access-control-allow-origin" not in client.get(path, headers=origin).headers
        preflight = origin | {"Access-Control-Request-Method": "POST"}
        assert client.options("/page/api/answer", headers=preflight).status_code == 405
    with served(model) as client:
        assert client.get("/page/api/model", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("steer", [{}, {"num_experts_per_tok": 2, "disable_experts": [[1, 0]]}])
def test_an_answer_opens_as_the_picture_of_what_was_made(
    model: Model, steer: dict[str, Any]
) -> None:
    steered = model.steer(num_experts_per_tok=2, disabled=[(1, 0)]) if steer else model
    with served(model) as client:
        asked = {"prompt": PROMPT, "max_tokens": 12, "n": 2, "logprobs": 0, **GREEDY, **steer}
        made = client.post("/v1/completions", json=asked).json()["choices"]
        for number, choice in enumerate(made):
            told = client.post("/page/api/answer", json={"number": 1, "text": number}).json()
            prompt = model.engine.encode(PROMPT)
            assert told["ids"][: told["prompt_tokens"]] == prompt and told["prompt"] == PROMPT
            assert len(told["ids"]) == len(prompt) + 12
            asked = {"ids": told["ids"], "steering": told["steering"]}
            steps = client.post("/page/api/trace", json=asked).json()["steps"]
            for step, own in zip(steps, read(steered.engine, told["ids"]), strict=True):
                assert step["logprob"] == (own.logprob and pytest.approx(own.logprob, rel=1e-4))
                for layer, theirs in zip(step["layers"], own.layers, strict=True):
                    assert (layer and layer["topk_ids"]) == (theirs and theirs.topk_ids)
            spoken = [step["logprob"] for step in steps[told["prompt_tokens"] :]]
            assert spoken == pytest.approx(choice["logprobs"]["token_logprobs"], rel=1e-3)
        assert client.post("/page/api/answer", json={"number": 1, "text": 2}).json()["code"] == (
            "answer_gone"
        )


def test_the_page_plays_and_asks_as_elsewhere(model: Model) -> None:
    with served(model) as client:
        info = client.get("/page/api/model").json()
        assert info["traffic"] and info["companions"] == []
        asked = {"prompt": PROMPT, "max_tokens": 4}
        lines = client.post("/page/api/generate", json=asked).text.splitlines()
        played = [json.loads(line[6:]) for line in lines if line]
        own = model.generate(PROMPT, max_tokens=4)
        made = [e["step"]["id"] for e in played if e["type"] == "token"]
        assert made[-4:] == [token.id for token in own.tokens]
        detail = client.post("/page/api/token", json={"prompt": PROMPT, "index": 3, "layer": 1})
        assert len(detail.json()["attention"]["mean"]) == 4


def test_a_text_longer_than_pictures_is_refused_in_a_sentence(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "MAX_PICTURE", 20)
    monkeypatch.setattr("moescope.server.apis.MAX_PICTURE", 20)
    with served(model) as client:
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 30, **GREEDY})
        refused = client.post("/page/api/answer", json={"number": 1})
        assert refused.json()["code"] == "picture_too_long"
        assert re.fullmatch(
            r"this text has \d+ tokens; pictures .* up to 20", refused.json()["message"]
        )
        for path in ("trace", "generate"):
            long = client.post(f"/page/api/{path}", json={"prompt": PROMPT * 2})
            assert long.status_code == 400 and long.json()["code"] == "picture_too_long"


# --- the list itself ------------------------------------------------------------------------------


def token(row: int, token_id: int = 5, text: str = "ab") -> Token:
    return Token(row, token_id, text, -0.5, None)


def test_the_list_is_bounded_in_requests_texts_tokens_and_characters(model: Model) -> None:
    traffic = Traffic(model.tokenizer)
    params = [SamplingParams()] * 3
    for number in range(1, 3 * MAX_REQUESTS):
        watched = traffic.begin("/v1/completions", [[5] * 10] * 5, params)
        assert watched.number == number
        for row in range(15):
            for _ in range(2 if number % 2 else MAX_PICTURE):
                watched.add(token(row))
        watched.end("ended")
        watched.end("cancelled")  # what comes later changes nothing
    clock, event = traffic.since(-1)
    assert event is not None and len(event.requests) == MAX_REQUESTS
    assert event.requests[0].number == event.oldest == 2 * MAX_REQUESTS
    assert traffic.since(clock) == (clock, None)
    for request in event.requests:
        assert request.state == "ended" and request.count == 15
        assert len(request.texts) == MAX_TEXTS
        few = request.number % 2 == 1
        for text in request.texts:
            assert len(text.answer) <= MAX_SHOWN and len(text.prompt) <= MAX_SHOWN
            assert text.kept == few
    assert len(traffic._requests) == len(traffic._changed) == MAX_REQUESTS
    kept = [text.ids for one in traffic._requests.values() for text in one.texts]
    assert all(ids is None or (isinstance(ids, array) and len(ids) <= MAX_PICTURE) for ids in kept)
    with pytest.raises(NotThere, match="no longer in the list"):
        traffic.answer(3, 0)
    with pytest.raises(NotThere, match=f"{10 + MAX_PICTURE} tokens"):
        traffic.answer(event.requests[0].number, 0)


def test_only_what_has_changed_is_told(model: Model) -> None:
    traffic = Traffic(model.tokenizer)
    first, second = (traffic.begin("/api/chat", [[5, 6]], [SamplingParams()]) for _ in range(2))
    clock, event = traffic.since(-1)
    assert event is not None and [r.state for r in event.requests] == ["waiting", "waiting"]
    second.add(token(0))
    clock, event = traffic.since(clock)
    assert event is not None and [(r.number, r.state) for r in event.requests] == [(2, "running")]
    first.end("cancelled")
    _, event = traffic.since(clock)
    assert event is not None and [(r.number, r.state) for r in event.requests] == [(1, "cancelled")]
