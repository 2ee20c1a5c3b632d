"""Who may ask: keys, names of the server, pages of other origins; and when nobody may any more."""

import re

import pytest
from small_server import served

from moescope.api import Model


def test_docs_need_no_network_and_no_key(talker: Model) -> None:
    with served(talker, api_key="sesame") as (client, _):
        page = client.get("/docs").text
        places = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
        assert len(places) == 3 and all(place.startswith("/docs/files/") for place in places)
        assert all(client.get(place).status_code == 200 for place in places)
        assert "SwaggerUIBundle" in client.get(next(p for p in places if p[-3:] == ".js")).text
        assert client.get("/docs/files/../../v1/models").status_code == 401
        assert client.get("/redoc").status_code == 401


def test_keys(talker: Model) -> None:
    with served(talker, api_key="sesame", metrics_key="count") as (client, _):
        for header in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):
            assert client.get("/v1/models", headers={"authorization": header}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
        for path in ("/v1/models", "/metrics", "/api/tags", "/tokenize"):
            assert client.get(path).status_code == 401
        assert client.get("/health").status_code == 200
        for key, statuses in (("count", (200, 401)), ("sesame", (200, 200))):
            headers = {"authorization": f"Bearer {key}"}
            found = [client.get(p, headers=headers).status_code for p in ("/metrics", "/v1/models")]
            assert tuple(found) == statuses


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("LOCALHOST", 200),
        ("host.docker.internal:8000", 200),
        ("evil.example", 400),
        ("evil.example@127.0.0.1", 400),
        ("127.0.0.1/evil.example", 400),
        ("127.0.0.1, evil.example", 400),
        ("127.0.0.1:x", 400),
        ("", 400),
    ],
)
def test_hosts_are_compared_as_sent(talker: Model, host: str, status: int) -> None:
    with served(talker, hosts=["Host.Docker.Internal"]) as (client, _):
        assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_pages_of_an_origin_may_ask(talker: Model) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served(talker, api_key="k", origins=["https://a.example"]) as (client, _):
        preflight = client.options("/v1/chat/completions", headers=asks)
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = client.options("/v1/models", headers=asks | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = client.get("/v1/models", headers={"origin": asks["origin"]})
        assert answer.status_code == 401  # and the page may read why
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_a_server_that_ends_takes_nothing_new(talker: Model) -> None:
    with served(talker) as (client, _):
        client.app.state.ending = True  # type: ignore[attr-defined]
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
