"""Whatever is sent, no request fails the server, and none leaves something behind.

`FUZZ_BODIES` says how many are sent, `FUZZ_MODEL` to what model; `make fuzz` sends 100,000.
"""

import json
import os
import random
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from bodies import damaged, encoded, of
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from served import ask, kilobytes, nothing_runs, process, said, save_tool_caller

from moescope.api import Model
from moescope.server.contract import openapi

BODIES = int(os.environ.get("FUZZ_BODIES", "300"))
MODEL = os.environ.get("FUZZ_MODEL")
ROUND = 500
"""Bodies that are drawn by one seed."""
WARM = 30
"""Rounds in which a server's memory comes to what it needs, its cache being full by then."""
MEASURED = 20
"""Rounds after those from which on growth can be told from noise."""
GROWTH = 512
"""Bytes that memory may grow with each body: a handful of objects that are left behind are more."""
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
        known: what it says to `KNOWN`.
        sizes: kB of its memory, round by round.
        statuses: answers by path and status.
    """

    process: subprocess.Popen[str]
    port: int
    document: Mapping[str, Any]
    known: Any
    sizes: list[int] = field(default_factory=list[int])
    statuses: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

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
    options = ("--name", "small", "--cache-memory", "0.02", "--watch")
    with process(MODEL or home, *options) as (server, port):
        known = ask(port, "/v1/completions", KNOWN)
        yield Served(server, port, joined(ask(port, "/openapi.json"), openapi()), known["choices"])
        assert server.poll() is None and said(server) == ""


def joined(apis: Mapping[str, Any], page: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description of all that a server answers: its APIs and, below /page, the page's own."""
    schemas, others = (document["components"]["schemas"] for document in (apis, page))
    assert not schemas.keys() & others.keys()
    paths = {f"/page{path}": how for path, how in page["paths"].items()}
    return {"paths": {**apis["paths"], **paths}, "components": {"schemas": {**schemas, **others}}}


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
        mistake = json.loads(told)
        error = mistake.get("error", mistake)
        message = error if isinstance(error, str) else error["message"]
        assert message and len(message) < 600, message


@pytest.mark.parametrize("number", range(-(-BODIES // ROUND)))
def test_no_body_fails_the_server(served: Served, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=min(ROUND, BODIES - number * ROUND),
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(asked=requests(served.document))
    def send(asked: tuple[str, bytes]) -> None:
        checked(served, *asked)

    send()
    assert ask(served.port, "/v1/completions", KNOWN)["choices"] == served.known
    nothing_runs(served.port)
    if Path("/proc/self/status").exists():
        served.sizes.append(kilobytes(served.process.pid))
    print(number + 1, served.sizes[-1:], sorted(served.statuses.items()), flush=True)


def growth(sizes: Sequence[int]) -> float:
    """Bytes by which memory grows with each body, of kB round by round (Theil and Sen's slope).

    A step, as where an allocator takes another arena, moves a median of slopes little.
    """
    slopes = [
        (later - earlier) / (after - before)
        for (before, earlier), (after, later) in combinations(enumerate(sizes), 2)
    ]
    return statistics.median(slopes) * 1024 / ROUND


def test_memory_has_not_grown(served: Served) -> None:
    if len(served.sizes) < WARM + MEASURED:
        pytest.skip(f"growth is told from {(WARM + MEASURED) * ROUND:,} bodies on")
    assert growth(served.sizes[WARM:]) < GROWTH, served.sizes


@pytest.mark.parametrize("leak", [0, 2 * GROWTH])
def test_growth_is_told_from_noise_and_steps(leak: int) -> None:
    chance = random.Random(leak)
    for _ in range(20):
        step = chance.randrange(MEASURED)
        sizes = [
            350_000
            + at * leak * ROUND // 1024
            + chance.randrange(-1000, 1000)
            + 2000 * (at >= step)
            for at in range(MEASURED)
        ]
        assert (growth(sizes) < GROWTH) == (leak == 0), sizes


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
