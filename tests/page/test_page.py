"""A reader's way through the page, in both languages; what it shows is what the engine says."""

import gzip
import re
import urllib.request
from xml.etree import ElementTree

import pytest
from reader import (
    LANGUAGES,
    STATIONS,
    TEXT,
    candidates,
    save,
    set_slider,
    settle,
    token_ids,
    write,
)

from moescope.api import Model

pytestmark = [pytest.mark.slow, pytest.mark.page]

WITHOUT_CONTROLS = """(node) => {
  const copy = node.cloneNode(true);
  const controls = copy.querySelectorAll('input, select, .visually-hidden, [data-unsaved]');
  controls.forEach((control) => control.remove());
  return copy.textContent;
}"""
"""An element's text as a saved picture has it."""


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_readers_way_through_the_page(open_page, language: str) -> None:
    page = open_page(f"lang={language}")
    assert page.locator("html").get_attribute("lang") == {"zh": "zh-CN", "en": "en"}[language]

    write(page, TEXT[language])
    prompt = page.locator("[data-testid=token]:not(.made)").count()
    assert len(token_ids(page)) > prompt > 1

    page.get_by_test_id("token").nth(prompt - 1).click()
    settle(page)
    assert page.locator("[data-testid=token][aria-selected=true]").count() == 1

    for station in STATIONS:
        section = page.get_by_test_id(f"station-{station}")
        section.scroll_into_view_if_needed()
        assert section.locator("h1, h2").first.inner_text().strip()
        heading = section.locator("h2 button")
        if heading.count():
            heading.click()
            assert heading.get_attribute("aria-expanded") == "false"
            heading.click()
    settle(page)

    before = candidates(page)
    assert 0 < sum(before.values()) <= 1 + 1e-6
    set_slider(page, "top-k", 1)
    assert page.locator("[data-testid=expert][data-active=true]").count() == 1
    after = candidates(page)
    assert before != after
    shown = page.get_by_test_id("station-router").get_by_test_id("changed").first
    assert float(shown.get_attribute("data-probability")) == pytest.approx(
        after[int(shown.get_attribute("data-token-id"))]
    )

    everybody = int(page.get_by_test_id("top-k").get_attribute("max"))
    set_slider(page, "top-k", everybody)
    assert page.locator("[data-testid=expert][data-active=true]").count() == everybody
    page.get_by_test_id("unsteer").click()
    settle(page)
    assert candidates(page) == before


def test_a_change_is_answered_first_where_the_reader_looks(open_page) -> None:
    page = open_page("lang=en")
    write(page, TEXT["en"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    set_slider(page, "top-k", 2)
    assert asked[0] == "token" and asked.count("token") == 1  # as it was is known already
    assert asked.count("trace") == 1


def test_stations_out_of_sight_rest_while_text_is_played(open_page) -> None:
    page = open_page("lang=en")
    write(page, TEXT["en"])
    before = candidates(page)
    page.evaluate(
        """() => {
          const next = document.querySelector('[data-testid=station-next] .picture');
          const playing = () => document.querySelector('[data-testid=play][aria-pressed=true]');
          window.redrawn = 0;
          new MutationObserver(() => playing() && window.redrawn++)
            .observe(next, { subtree: true, childList: true, attributes: true });
        }"""
    )
    write(page, TEXT["en"] + " a")
    assert page.evaluate("window.redrawn") <= 1
    assert candidates(page) != before


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_its_experts_the_model_writes_something_else(open_page, language: str) -> None:
    page = open_page(f"lang={language}")
    write(page, TEXT[language])

    expert = page.locator("[data-testid=expert][data-active=true]").first
    number = expert.get_attribute("data-expert")
    expert.click()
    page.get_by_test_id("disable-expert").click()
    settle(page)
    chosen = page.locator(f"[data-testid=expert][data-expert='{number}']")
    assert chosen.get_attribute("data-active") == "false"
    assert page.get_by_test_id("disable-expert").get_attribute("aria-pressed") == "true"

    # One expert of sixty-four may not be missed; many are.
    for _ in range(8):
        page.get_by_test_id("offer").first.click()
        settle(page)
    page.get_by_test_id("whatif-verdict").wait_for()

    def written(side: str) -> list[str]:
        return [
            token.get_attribute("data-token-id")
            for token in page.get_by_test_id(f"whatif-{side}").locator("[data-token-id]").all()
        ]

    assert written("before") != written("after")
    assert page.get_by_test_id("whatif-after").locator(".changed").count() > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_address_brings_the_picture_back(open_page, language: str, tmp_path) -> None:
    page = open_page(f"lang={language}")
    write(page, TEXT[language])
    page.get_by_test_id("token").nth(2).click()
    set_slider(page, "top-k", 3)
    set_slider(page, "max-tokens", 40)
    set_slider(page, "head", 1)
    page.get_by_test_id("theme").click()
    page.get_by_test_id("theme").click()  # as the system, light, dark
    page.get_by_test_id("expert").nth(5).click()
    for station in ("tokens", "merge"):
        page.get_by_test_id(f"station-{station}").locator("h2 button").click()
    settle(page)
    page.wait_for_timeout(500)  # the address follows a little later

    def look(page) -> dict[str, object]:
        folds = page.locator("h2 button[aria-expanded=false]").all()
        return {
            "ids": token_ids(page),
            "candidates": candidates(page),
            "picture": save(page, "router", tmp_path),
            "expert": page.locator("[data-testid=expert][aria-selected=true]").get_attribute(
                "data-expert"
            ),
            "folded": [
                fold.locator("xpath=ancestor::section").get_attribute("id") for fold in folds
            ],
            "theme": page.locator("html").get_attribute("data-theme"),
            "tokens to write": page.get_by_test_id("max-tokens").input_value(),
            "head": page.get_by_test_id("head").input_value(),
        }

    first = look(page)
    assert first["expert"] == "5" and first["theme"] == "dark" and first["tokens to write"] == "40"
    assert first["folded"] == ["station-tokens", "station-merge"] and first["head"] == "1"
    again = open_page(page.url.partition("?")[2])
    settle(again)
    assert look(again) == first


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_picture_is_saved_whole(open_page, language: str, tmp_path) -> None:
    """With its title, and with the words that stand around the drawings in HTML."""
    page = open_page(f"lang={language}")
    write(page, TEXT[language])
    page.get_by_test_id("think").click()
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("write-both").click()
    page.get_by_test_id("whatif-verdict").wait_for()
    settle(page)
    for station in STATIONS:
        section = page.get_by_test_id(f"station-{station}")
        section.scroll_into_view_if_needed()
        settle(page)
        picture = ElementTree.fromstring(save(page, station, tmp_path))
        assert picture.tag.endswith("svg"), station
        words = re.sub(r"\s+", "", "".join(picture.itertext()))
        body = section.locator("[data-picture]" if station == "prompt" else ".picture")
        texts = body.locator(":is(h3, h4, p, dt, dd, li):not(.visually-hidden):not(:has(svg))")
        for text in [section.locator("> header p"), *texts.all()]:
            assert re.sub(r"\s+", "", text.evaluate(WITHOUT_CONTROLS)) in words, station
    thought = "".join(ElementTree.fromstring(save(page, "thinking", tmp_path)).itertext())
    for part in ("<think>", "carry", "85"):
        assert part in thought


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_saved_with_what_was_never_in_sight(
    open_page, browser, language: str, tmp_path
) -> None:
    page = open_page(f"lang={language}")
    with page.expect_download() as download:
        page.get_by_test_id("save-page").click()
    file = tmp_path / "page.html"
    download.value.save_as(file)
    saved = browser.new_page()
    saved.goto(file.as_uri())
    for part in ("drift", "balance-copy", "cut-reference", "relu-relu"):
        assert saved.get_by_test_id(part).is_visible(), part
    assert saved.locator("script").count() == 0
    saved.close()


def test_what_a_print_needs_comes_while_the_page_is_at_rest(open_page) -> None:
    page = open_page("lang=en")
    with page.expect_response("**/api/training"):  # far below, and nobody scrolled there
        pass
    settle(page)
    assert page.get_by_test_id("drift").count() == 0  # it would cost every other change
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_test_id("drift").is_visible()


def test_the_pages_numbers_are_the_engines(open_page, engine: Model) -> None:
    page = open_page("lang=en")
    write(page, TEXT["zh"])
    trace = engine.trace(TEXT["zh"], max_tokens=48)
    ids = token_ids(page)
    assert ids == [token.id for token in trace.tokens][: len(ids)]

    place = 3
    page.get_by_test_id("token").nth(place).click()
    settle(page)
    shown = candidates(page)
    for guess in trace.guesses[place]:
        assert shown[guess.id] == pytest.approx(guess.probability, rel=1e-3)

    layer = int(page.get_by_test_id("layer").input_value())
    router = trace.layers[layer].router
    assert router is not None
    active = page.locator("[data-testid=expert][data-active=true]")
    weights = {
        int(cell.get_attribute("data-expert")): float(cell.get_attribute("data-weight"))
        for cell in active.all()
    }
    expected = dict(zip(router.topk_ids[place], router.topk_weights[place], strict=True))
    assert weights == pytest.approx(expected, rel=1e-3)

    used, total = trace.tokens[place].parameters_used, trace.total_parameters
    counter = page.get_by_test_id("counter").inner_text()
    assert f"{round(100 * used / total)}%" in counter


def test_the_bars_of_the_merge_add_up(open_page) -> None:
    page = open_page("lang=en")
    write(page, TEXT["en"])
    bars = page.get_by_test_id("station-merge").locator("[data-projection]").all()
    total = sum(float(bar.get_attribute("data-projection")) for bar in bars)
    assert page.get_by_test_id("merge-sum").text_content().strip() == f"{total:.2f}"


def test_everything_works_by_keyboard(open_page) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("prompt").focus()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type(TEXT["en"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.testid") == "play"
    page.keyboard.press("Enter")
    page.locator("[data-testid=play][aria-pressed=true]").wait_for()
    page.locator("[data-testid=play][aria-pressed=false]").wait_for()

    tab_to(page, "token")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    chosen = page.locator("[data-testid=token][aria-selected=true]")
    assert chosen.get_attribute("data-token-id") == str(token_ids(page)[1])

    tab_to(page, "top-k")
    settle(page)
    before = candidates(page)
    page.keyboard.press("Home")
    settle(page)
    assert candidates(page) != before

    tab_to(page, "expert")
    page.keyboard.press("End")
    last = page.evaluate("document.activeElement.dataset.expert")
    assert int(last) == page.get_by_test_id("expert").count() - 1
    tab_to(page, "disable-expert")
    page.keyboard.press("Enter")
    settle(page)
    pressed = page.get_by_test_id("disable-expert").get_attribute("aria-pressed")
    assert pressed == "true"


def tab_to(page, testid: str) -> None:
    """Press Tab until the element has the focus; nothing on the way may trap it."""
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.testid") == testid:
            return
    pytest.fail(f"120 tabs did not reach {testid}")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_nothing_serious(
    open_page, axe: str, language: str, theme: str, width: int
) -> None:
    size = {"width": width, "height": 900}
    page = open_page(f"lang={language}", color_scheme=theme, viewport=size, bypass_csp=True)
    write(page, TEXT[language])
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("write-both").click()
    page.get_by_test_id("whatif-verdict").wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    settle(page)
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    serious = [
        (rule["id"], [node["target"] for node in rule["nodes"]])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [390, 2560])
def test_nothing_sticks_out(open_page, language: str, width: int) -> None:
    page = open_page(f"lang={language}", viewport={"width": width, "height": 844})
    write(page, TEXT[language])
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("write-both").click()
    page.get_by_test_id("whatif-verdict").wait_for()
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chip in page.get_by_test_id("expert").all()[:4]:
        box = chip.bounding_box()
        assert box["width"] >= 24 and box["height"] >= 24


def test_a_reader_who_plays_at_once_is_not_overtaken(open_page) -> None:
    page = open_page("lang=en", wait="prompt")
    page.get_by_test_id("prompt").fill("the moon")
    page.get_by_test_id("play").click()
    page.locator("[data-testid=token].made").first.wait_for()
    settle(page)
    text = page.locator("[data-testid=token]:not(.made) .text").all_inner_texts()
    assert "moon" in "".join(text)
    assert page.locator("[data-testid=token].made").count() > 1


def test_a_language_is_one_click_away(open_page) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("language").click()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.wait_for_timeout(500)
    assert "lang=zh" in page.url
    chinese = page.get_by_test_id("station-router").locator("h2").inner_text()
    assert re.search(r"[一-鿿]", chinese)


def test_an_emoji_storm_is_a_text_like_any_other(open_page) -> None:
    page = open_page("lang=en")
    write(page, "👩‍👩‍👧‍👦🏳️‍🌈🇨🇳" * 6)
    assert len(token_ids(page)) > 24
    assert page.get_by_test_id("error").count() == 0


def test_guess_first_covers_every_answer(open_page) -> None:
    page = open_page("lang=en")
    write(page, TEXT["en"])
    page.get_by_test_id("guess-first").check()
    router = page.get_by_test_id("station-router")
    assert router.get_by_test_id("changed").count() == 0
    page.get_by_test_id("candidate").first.click()
    assert router.get_by_test_id("changed").count() > 0


def test_the_page_is_light(server) -> None:
    """At most 350 KB come over the wire, packed as a browser asks for it."""

    def fetch(path: str) -> bytes:
        request = urllib.request.Request(server.address + path, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    known: dict[str, int] = {}
    waiting = [""]
    while waiting:
        file = waiting.pop()
        packed = fetch(file)
        known[file] = len(packed)
        named = re.findall(r"[\w-]+-[\w-]{8}\.(?:js|css)", gzip.decompress(packed).decode())
        waiting += {f"assets/{name}" for name in named} - known.keys()
    assert len(known) >= 4  # the HTML, the first screen's script, the stations and their style
    assert sum(known.values()) < 350_000
