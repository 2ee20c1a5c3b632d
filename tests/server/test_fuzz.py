"""Whatever is sent, no request fails the server, and none leaves something behind.

`FUZZ_BODIES` says how many are sent, `FUZZ_MODEL` to what model; `make fuzz` sends 100,000.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from bodies import damaged, encoded, of
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from served import ask, gauge, kilobytes, process, save_tool_caller

from moescope.api import Model

BODIES = int(os.environ.get("FUZZ_BODIES", "300"))
MODEL = os.environ.get("FUZZ_MODEL")
ROUND = 1000
"""Bodies that are drawn by one seed."""
WARM = 5
"""Rounds in which a server's memory comes to what it needs."""
SECONDS = 120.0
"""That any of these bodies may take."""
KNOWN = {"prompt": "the moon before", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@dataclass
class Served:
    """A server process, and what it was asked.

    Attributes:
        process: that answers.
        port: where.
        document: its OpenAPI document.
        statuses: answers by path and status.
    """

    process: subprocess.Popen[str]
    port: int
    document: Mapping[str, Any]
    statuses: dict[tuple[str, int], int]

    def send(self, path: str, body: bytes) -> tuple[int, str]:
        """Return the status and the body of the answer."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = answer.read().decode()
        at = path, answer.status
        self.statuses[at] = self.statuses.get(at, 0) + 1
        return answer.status, told


@pytest.fixture(scope="module")
def served(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("fuzz") / "small"
    save_tool_caller(model, home, positions=512)
    with process(MODEL or home, "--name", "small", "--cache-memory", "0.05") as (server, port):
        yield Served(server, port, ask(port, "/openapi.json"), {})
        assert server.poll() is None


def requests(document: Mapping[str, Any]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Paths, each with the bytes of what is sent there."""
    posts = {path: how["post"] for path, how in document["paths"].items() if "post" in how}
    drawn = [
        st.tuples(st.just(path), encoded(damaged(of(_schema(post), document))))
        for path, post in posts.items()
    ]
    return st.one_of(drawn) | st.tuples(st.sampled_from(sorted(posts)), st.binary(max_size=60))


def _schema(post: Mapping[str, Any]) -> Any:
    return post["requestBody"]["content"]["application/json"]["schema"]


def checked(served: Served, path: str, body: bytes) -> None:
    status, told = served.send(path, body)
    assert status < 500, told
    assert "server failed" not in told  # in the middle of a stream
    if status != 200:
        error = json.loads(told)["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message and len(message) < 600, message


def test_no_body_fails_the_server(served: Served) -> None:
    known = ask(served.port, "/v1/completions", KNOWN)["choices"]
    sizes: list[int] = []
    left = BODIES
    for number in range(-(-BODIES // ROUND)):
        count, left = min(ROUND, left), left - ROUND

        @seed(number)
        @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
        @given(asked=requests(served.document))
        def send(asked: tuple[str, bytes]) -> None:
            checked(served, *asked)

        send()
        assert ask(served.port, "/v1/completions", KNOWN)["choices"] == known
        assert gauge(served.port, "moescope_requests_running") == 0
        assert gauge(served.port, "moescope_cache_bytes") == 0
        if Path("/proc/self/status").exists():
            sizes.append(kilobytes(served.process.pid))
        print(number + 1, sizes[-1:], sorted(served.statuses.items()), flush=True)
    if len(sizes) > 2 * WARM:
        assert sizes[-1] < 1.05 * sizes[WARM], sizes


def test_what_is_wrong_leaves_nothing_behind(served: Served) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    body = json.dumps({"messages": [{"role": "user", "content": [[1] * 9] * 999}]}).encode()
    for _ in range(30):
        checked(served, "/v1/chat/completions", body)
    before = kilobytes(served.process.pid)
    for _ in range(300):
        checked(served, "/v1/chat/completions", body)
    assert kilobytes(served.process.pid) - before < 20_000
