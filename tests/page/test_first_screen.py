"""The first screen: what a mixture of experts is, on the live model, without scrolling."""

import pytest
from reader import LANGUAGES, PLAYED, settle

from moescope.api import Model

pytestmark = [pytest.mark.slow, pytest.mark.page]

SIZES = [(1280, 900), (390, 844)]


def active(page) -> set[int]:
    lights = page.locator("[data-testid=hero-expert][data-active=true]")
    return {int(light) for light in lights.evaluate_all("(n) => n.map((x) => x.dataset.expert)")}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("size", SIZES)
def test_the_picture_stands_on_the_first_screen(
    open_page, engine: Model, language: str, size: tuple[int, int]
) -> None:
    width, height = size
    page = open_page(f"lang={language}", viewport={"width": width, "height": height})
    config = engine.network.config
    page.get_by_test_id("hero-lead").wait_for()
    assert page.get_by_test_id("hero-expert").count() == config.n_routed_experts
    assert len(active(page)) == config.num_experts_per_tok
    for part in ("hero", "hero-switch", "tour-next", "hero-cost", "hero-reference"):
        box = page.get_by_test_id(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, part
        assert box["y"] + box["height"] <= height, part
    words = page.get_by_test_id("first-screen").inner_text()
    assert {"zh": "分诊台", "en": "triage desk"}[language] in words
    assert "DeepSeek-R1" in words


def test_the_lights_are_the_engines_and_move(open_page, engine: Model) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("hero-lead").wait_for()
    settle(page)
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "17+25=?"}])
    trace = engine.trace(prompt, max_tokens=48, temperature=0.0)
    routers = [layer.router for layer in trace.layers]
    seen: set[frozenset[int]] = set()
    for _ in range(60):
        seen.add(frozenset(active(page)))
        if len(seen) > 3:
            break
        page.wait_for_timeout(300)
    assert len(seen) > 3  # it moves by itself
    some = next(iter(seen))
    layer = next(
        router
        for router in routers
        if router is not None and some in map(frozenset, router.topk_ids)
    )
    assert seen <= set(map(frozenset, layer.topk_ids))
    page.get_by_test_id("hero-pause").click()
    still = active(page)
    page.wait_for_timeout(1500)
    assert active(page) == still


def test_asking_everybody_changes_picture_and_cost(open_page, engine: Model) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("hero-lead").wait_for()
    settle(page)
    page.get_by_test_id("hero-pause").click()
    cost = page.get_by_test_id("hero-cost")
    used = int(cost.get_attribute("data-used"))
    assert used < int(cost.get_attribute("data-total")) / 2
    page.get_by_test_id("hero-switch").click()
    total = cost.get_attribute("data-total")
    page.locator(f"[data-testid=hero-cost][data-used='{total}']").wait_for()
    assert len(active(page)) == engine.network.config.n_routed_experts
    page.get_by_test_id("hero-switch").click()
    assert int(cost.get_attribute("data-used")) == used


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tour_has_six_steps_and_can_be_left(open_page, language: str) -> None:
    page = open_page(f"lang={language}")
    told: list[str] = []
    page.get_by_test_id("tour-next").click()
    for step in range(6):
        told.append(page.get_by_test_id("tour").locator("p").inner_text())
        assert told[-1].startswith(f"{step + 1} / 6")
        page.get_by_test_id("tour-next").click()
    assert len(set(told)) == 6
    assert page.get_by_test_id("tour").count() == 0
    page.get_by_test_id("tour-next").click()
    page.get_by_test_id("tour-leave").click()
    assert page.get_by_test_id("tour").count() == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_contents_number_every_station(open_page, language: str) -> None:
    page = open_page(f"lang={language}")
    lines = page.get_by_test_id("contents").locator("a").all()
    for number, line in enumerate(lines, 1):
        station = page.locator(line.get_attribute("href"))
        assert line.inner_text().split()[0] == str(number)
        assert station.locator("h2 .ordinal").inner_text() == str(number)
    lines[-1].click()
    last = page.locator(lines[-1].get_attribute("href"))
    for _ in range(20):
        page.wait_for_timeout(300)
        if last.bounding_box()["y"] < 500:
            break
    page.wait_for_timeout(900)  # and there it stays
    assert last.bounding_box()["y"] < 500


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_domains_experts_go_off_together(open_page, engine: Model, language: str) -> None:
    page = open_page(f"lang={language}")
    settle(page)
    assert page.get_by_test_id("whatif-note").count() == 0
    page.get_by_test_id("off-arithmetic").click()
    page.locator("[data-testid=proof][aria-busy=false][data-after]").wait_for(timeout=PLAYED)
    proof = page.get_by_test_id("proof")
    broken, whole = (int(proof.get_attribute(f"data-{side}")) for side in ("after", "before"))
    assert (whole, broken) == (6, 0)  # sums need them
    poem = proof.locator("[lang=zh-CN]").last.inner_text()
    note = page.get_by_test_id("whatif-note").inner_text()
    page.wait_for_timeout(600)
    number = page.evaluate("new URLSearchParams(location.search).get('off').split(',').length")
    assert str(number) in note
    again = open_page(page.url.partition("?")[2])
    assert str(number) in again.get_by_test_id("whatif-note").inner_text()
    page.get_by_test_id("off-poetry").click()
    page.locator("[data-testid=proof][aria-busy=false][data-after]").wait_for(timeout=PLAYED)
    assert int(proof.get_attribute("data-after")) >= 5  # and hardly those of poetry
    assert len(set(poem)) > len(set(proof.locator("[lang=zh-CN]").last.inner_text()))


@pytest.mark.parametrize("language", LANGUAGES)
def test_experts_have_names_in_the_readers_language(open_page, language: str) -> None:
    page = open_page(f"lang={language}")
    settle(page)
    names = page.get_by_test_id("station-experts").get_by_test_id("expert-name").all()
    assert len(names) >= 8
    chinese = [any("\u4e00" <= c <= "\u9fff" for c in name.inner_text()) for name in names]
    assert (sum(chinese) > len(chinese) / 2) == (language == "zh")
    names[0].click()
    settle(page)
    inside = page.get_by_test_id("expert-inside").inner_text()
    assert names[0].inner_text().split(maxsplit=1)[1] in inside
