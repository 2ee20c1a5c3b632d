"""The page inside `moescope serve --watch`: a key, a list that lives, and answers as pictures."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from reader import LANGUAGES, token_ids
from served import process

from moescope.api import Model

pytestmark = [pytest.mark.slow, pytest.mark.page]

KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "翻译成中文：moonlight"}]}
CHAT |= {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
WIDTHS = [390, 1280]


@pytest.fixture(scope="module")
def watched() -> Iterator[int]:
    """The port of a server with a key that watches."""
    with process("tiny", "--watch", "--api-key", KEY) as (_, port):
        yield port


def ask(port: int, path: str, asked: Any) -> Any:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", path, json.dumps(asked), HEADERS)
        answer = connection.getresponse()
        assert answer.status == 200
        return json.loads(answer.read())


def hang_up(port: int) -> None:
    """Ask for a long text, and leave after its first words."""
    asked = {"prompt": "床前明月光", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(asked), HEADERS)
        connection.getresponse().readline()


def unlock(page) -> None:
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    page.get_by_test_id("traffic").wait_for()
    page.get_by_test_id("token").first.wait_for()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_of_others_open_as_pictures(
    open_page, axe: str, engine: Model, watched: int, language: str, width: int
) -> None:
    page = open_page(
        f"lang={language}",
        address=f"http://127.0.0.1:{watched}/page/",
        wait="key",
        viewport={"width": width, "height": 900},
    )
    assert page.get_by_test_id("traffic").count() == 0  # nothing is seen without the key
    page.locator("#key").fill("open sesame")
    page.locator("#key").press("Enter")
    page.get_by_role("alert").wait_for()
    unlock(page)
    before = page.get_by_test_id("request").count()

    made = ask(watched, "/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]
    first = page.get_by_test_id("request").first
    page.locator(f"[data-testid=request] >> nth={before}").wait_for()  # it came by itself
    page.wait_for_function(
        "() => document.querySelector('[data-testid=request]').dataset.state === 'ended'"
    )
    assert "moonlight" in first.inner_text() and "/v1/chat/completions" in first.inner_text()
    assert made.strip()[:2] in first.inner_text()  # control tokens are left out

    first.get_by_test_id("open-answer").click()
    prompt = engine.engine.encode_chat(CHAT["messages"])
    told = engine.stream(prompt, max_tokens=12, ignore_eos=True)
    ids = prompt + [token.id for token in told]
    page.wait_for_function(f"() => document.querySelectorAll('.chip.made').length === {12}")
    assert token_ids(page) == ids
    page.get_by_test_id("station-flow").wait_for()

    hang_up(watched)
    page.locator("[data-testid=request][data-state=cancelled]").first.wait_for()
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    assert [v for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.reload()  # the key is kept as long as the tab is
    page.get_by_test_id("request").first.wait_for()
    assert page.get_by_test_id("key").count() == 0


def test_a_list_that_stops_says_so_and_goes_on_when_asked(open_page) -> None:
    with process("tiny", "--watch") as (server, port):
        page = open_page("lang=en", address=f"http://127.0.0.1:{port}/page/", wait="traffic-empty")
        ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 2})
        page.get_by_test_id("request").wait_for()
        server.terminate()
        lost = page.get_by_test_id("traffic-lost")
        lost.wait_for()
        server.wait(timeout=60)
        server.returncode = 0
    with process("tiny", "--watch", "--port", str(port)):
        lost.get_by_role("button").click()
        lost.wait_for(state="detached")
        page.get_by_test_id("traffic-empty").wait_for()  # nothing was kept on disk
        page.close()  # or it says, at any later time, that this server ended, too
    page.said[:] = [text for text in page.said if "ERR_" not in text]
