"""Whatever is sent, no request fails the server, and none leaves something behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.server.apis import create_api
from moescope.server.model_thread import ModelThread
from moescope.text.tokenizer import Tokenizer

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/tokenize",
    "/detokenize",
)
SMALL = {"max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}, "stream": False}
TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ tools }}<tool_call>"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[TestClient]:
    config = {**model.tokenizer._config, "chat_template": TEMPLATE}
    talker = Model("small", model.network, Tokenizer(model.tokenizer._backend, config))
    thread = ModelThread(talker.engine, 4, 2**24)
    with TestClient(
        create_api(talker, thread, name="small"),
        base_url="http://127.0.0.1:8000",
        raise_server_exceptions=False,
    ) as client:
        yield client


def fields(client: TestClient) -> list[str]:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    return sorted({name for schema in schemas.values() for name in schema.get("properties", {})})


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(("type", "text", "role", "content", "name", "function", "input")),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(("user", "assistant", "tool", "system")),
            "content": st.one_of(st.text(max_size=6), VALUES),
        }
    ),
    min_size=1,
    max_size=2,
)


def checked(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message and len(message) < 600, message


@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_fields_fail_the_server(client: TestClient, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(PATHS))
    named = st.dictionaries(st.sampled_from(fields(client)), VALUES, max_size=4)
    base = {"model": "small", "messages": data.draw(MESSAGES), "prompt": "x", "input": "x"}
    asked: dict[str, Any] = base | {"tokens": [1], **SMALL} | data.draw(named)
    limits = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "options")
    for name in limits:
        if name not in SMALL:
            asked.pop(name, None)
        else:
            asked[name] = SMALL[name]
    checked(client, path, json.dumps(asked).encode())


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60))
def test_no_bytes_fail_the_server(client: TestClient, path: str, body: bytes) -> None:
    checked(client, path, body)
    checked(client, path, b'{"prompt":' + body + b'","model":"small"}')


def test_what_is_wrong_leaves_nothing_behind(client: TestClient) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")

    def held() -> int:
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    body = json.dumps({"messages": [{"role": "user", "content": [[1] * 9] * 999}]}).encode()
    for _ in range(30):
        checked(client, "/v1/chat/completions", body)
    before = held()
    for _ in range(300):
        checked(client, "/v1/chat/completions", body)
    assert held() - before < 20_000
