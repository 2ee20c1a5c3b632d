"""A server over the small model, and what several tests look at of it."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from moescope.api import Model, sampling_params
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread

PROMPT = "the moon before my bed"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@contextmanager
def served(model: Model, **options: Any) -> Iterator[tuple[TestClient, ModelThread]]:
    model = Model(model.name, model.network, model.tokenizer)  # two threads share no engine's cache
    thread = ModelThread(model.engine, options.pop("max_batch", 4), 2**24)
    api = create_api(model, thread, name="small", access=Access(**options))
    with TestClient(api, base_url="http://127.0.0.1:8000") as client:
        yield client, thread


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


def expected(model: Model, prompt: str, **sampling: Any) -> list[Any]:
    params = sampling_params({"max_tokens": 16, "temperature": 0.0, **sampling})
    return list(model.engine.repeat([model.engine.encode(prompt)], params))


def text_of(tokens: list[Any]) -> str:
    return "".join(token.text for token in tokens)


def numbers(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    found = (re.match(r"([^#\s]+(?:\{[^}]*\})?) ([0-9.e+-]+)$", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}
