"""61 layers of 256 experts: the counts of DeepSeek-V3 stay readable on the page."""

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reader import TEXT, candidates, save, set_slider, settle, token_ids

import moescope

pytestmark = [pytest.mark.slow, pytest.mark.page]

LAYER = 37
BOXES = "(nodes) => nodes.map((node) => node.getBoundingClientRect().toJSON())"


def test_61_layers_of_256_experts_stay_readable(
    open_page, start_server, large: Path, tmp_path: Path
) -> None:
    page = open_page("lang=zh", address=start_server(str(large)).address)
    page.get_by_test_id("prompt").fill(TEXT["zh"])
    page.get_by_test_id("reset").click()
    set_slider(page, "layer", LAYER)
    assert page.get_by_test_id("expert").count() == 256

    # What is drawn is the engine's.
    trace = moescope.load(large).trace(TEXT["zh"])
    assert token_ids(page) == [token.id for token in trace.tokens]
    router = trace.layers[LAYER].router
    assert router is not None
    active = page.locator("[data-testid=expert][data-active=true]").all()
    weights = {
        int(e.get_attribute("data-expert")): float(e.get_attribute("data-weight")) for e in active
    }
    expected = dict(zip(router.topk_ids[-1], router.topk_weights[-1], strict=True))
    assert weights == pytest.approx(expected, rel=1e-3)

    # The numbers of the chosen can be read, and so can those at the edges of the heat map.
    flow = page.get_by_test_id("station-flow").locator("circle.lit").evaluate_all(BOXES)
    assert len(flow) == 8
    for a, b in combinations(flow, 2):
        across, down = a["x"] - b["x"], a["y"] - b["y"]
        assert (across**2 + down**2) ** 0.5 > 0.75 * a["width"]
    balance = page.get_by_test_id("station-balance")
    balance.scroll_into_view_if_needed()
    settle(page)
    for selector in ("text.tick", "text[text-anchor=end]"):
        for a, b in combinations(
            balance.get_by_test_id("heat-map").locator(selector).evaluate_all(BOXES), 2
        ):
            apart = a["right"] <= b["x"] or b["right"] <= a["x"]
            assert apart or a["bottom"] <= b["y"] + 4 or b["bottom"] <= a["y"] + 4
    picture = ElementTree.fromstring(save(page, "balance", tmp_path))
    assert any(node.tag.endswith("image") for node in picture.iter())

    before = candidates(page)
    set_slider(page, "top-k", 256)
    assert page.locator("[data-testid=expert][data-active=true]").count() == 256
    assert candidates(page) != before

    page.set_viewport_size({"width": 390, "height": 844})
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
