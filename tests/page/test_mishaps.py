"""What goes wrong is told in a sentence: no blank screen, and nothing in the browser's console."""

import shutil
from pathlib import Path

import pytest
from reader import TEXT, settle, token_ids, write

from moescope.catalog import BOX

pytestmark = [pytest.mark.slow, pytest.mark.page]


def test_a_text_too_long_is_answered_with_a_sentence(open_page) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("prompt").fill("很长" * 50_000)
    page.get_by_test_id("play").click()
    error = page.get_by_test_id("error")
    error.wait_for()
    assert "100,000" in error.inner_text()


@pytest.mark.parametrize(
    ("language", "words"), [("zh", "模型的上下文最多 2,048 个"), ("en", "context holds 2,048")]
)
def test_more_than_the_context_is_answered_with_a_sentence(
    open_page, language: str, words: str
) -> None:
    page = open_page(f"lang={language}")
    page.get_by_test_id("prompt").fill("月 " * 2000)
    page.get_by_test_id("play").click()
    error = page.get_by_test_id("error")
    error.wait_for()
    assert words in error.inner_text()
    error.get_by_role("button").click()
    write(page, TEXT[language])
    assert page.get_by_test_id("error").count() == 0


def test_a_server_that_dies_is_named_and_missed_no_longer_when_back(
    open_page, start_server
) -> None:
    own = start_server()
    page = open_page("lang=en", address=own.address)
    settle(page)
    own.stop()
    page.get_by_test_id("play").click()
    error = page.get_by_test_id("error")
    error.wait_for()
    assert "does not answer" in error.inner_text()
    settle(page)  # what the page asked at the same moment is refused too
    refused = [text for text in page.said if "ERR_" in text]
    assert refused
    for place in (1, 2, 3):  # what the page would ask by itself it asks no more
        page.get_by_test_id("token").nth(place).click()
        settle(page)
    assert [text for text in page.said if "ERR_" in text] == refused
    own.start()
    error.get_by_role("button").click()
    write(page, TEXT["en"])
    assert page.get_by_test_id("error").count() == 0
    # Chromium itself notes what was asked in vain; the page says nothing of its own.
    page.said[:] = [text for text in page.said if text not in refused]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """The models in the box, where they can be spoilt."""
    for name in ("tiny", "tiny-dense"):
        shutil.copytree(BOX / name, tmp_path / name)
    return tmp_path


def test_a_model_that_vanishes_is_missed_in_words(open_page, start_server, shelf: Path) -> None:
    own = start_server(str(shelf / "tiny"))
    for folder in list(shelf.iterdir()):
        shutil.rmtree(folder)
    page = open_page("lang=en", address=own.address)
    write(page, TEXT["en"])
    assert len(token_ids(page)) > 8  # the model itself is in memory
    page.get_by_test_id("dense-moe").click()
    twin = page.get_by_test_id("station-dense").get_by_role("alert")
    twin.wait_for()
    assert "tiny-dense" in twin.inner_text()
    page.get_by_test_id("station-training").scroll_into_view_if_needed()
    training = page.get_by_test_id("station-training").get_by_role("alert")
    assert "no history of its training" in training.inner_text()
    assert page.get_by_test_id("error").count() == 0


@pytest.mark.parametrize(("language", "words"), [("zh", "打不开稠密的对照"), ("en", "cannot be")])
def test_a_broken_companion_is_told_before_it_is_asked(
    open_page, start_server, shelf: Path, language: str, words: str
) -> None:
    (shelf / "tiny-dense" / "config.json").write_text("{")
    own = start_server(str(shelf / "tiny"))
    page = open_page(f"lang={language}", address=own.address)
    told = page.get_by_test_id("no-twin").inner_text()
    assert words in told and "config.json" in told
    assert page.get_by_test_id("dense-moe").count() == 0
    # Nor is there a copy trained without balancing: the lesser view is offered, by its name.
    page.get_by_test_id("own-text").click()  # that view is of the reader's text alone
    page.get_by_test_id("compare-balance").check()
    settle(page)
    note = page.get_by_test_id("balance-note").inner_text()
    assert {"zh": "并非另外训练", "en": "not another training"}[language] in note


def test_a_server_without_an_answer_is_asked_again(open_page) -> None:
    lost = True

    def answer(route) -> None:
        if lost:
            told = {"type": "error", "message": "the model is gone; open it again"}
            route.fulfill(json=told)
        else:
            route.continue_()

    page = open_page("lang=en", wait="error", routes={"**/api/start/en": answer})
    error = page.get_by_test_id("error")
    assert "the model is gone" in error.inner_text()
    lost = False
    error.get_by_role("button").click()
    page.get_by_test_id("token").first.wait_for()
