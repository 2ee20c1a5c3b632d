"""The copy trained without balancing, side by side on the reader's own text."""

import json

import pytest
from reader import LANGUAGES, TEXT, settle, token_ids, write

import moescope
from moescope.catalog import BOX
from moescope.scope.recording import record
from moescope.scope.specialization import Specialization

pytestmark = [pytest.mark.slow, pytest.mark.page]

COPY = BOX / "tiny-unbalanced"


def numbers(page, name: str) -> dict[str, float]:
    """MaxVio, overloaded and idle experts of a map."""
    shown = page.get_by_test_id(f"balance-{name}")
    names = ("max-violation", "overloaded", "idle")
    return {name: float(shown.get_attribute(f"data-{name}")) for name in names}


def expected(loads: list[list[float]]) -> dict[str, float]:
    """The same from loads, `[layer][expert]` in any unit; an even share is a layer's mean."""
    times = [[load * len(layer) / sum(layer) for load in layer] for layer in loads]
    every = [load for layer in times for load in layer]
    return {
        "max-violation": sum(max(layer) - 1 for layer in times) / len(times),
        "overloaded": sum(load > 2 for load in every),
        "idle": sum(load == 0 for load in every),
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_balance_stands_beside_a_copy_without(open_page, language: str) -> None:
    asked: list[str] = []
    page = open_page(f"lang={language}")
    page.on("request", lambda request: asked.append(request.url))
    write(page, TEXT[language])
    assert not any("unbalanced" in url for url in asked)  # only once it is in sight
    station = page.get_by_test_id("station-balance")
    station.scroll_into_view_if_needed()
    page.get_by_test_id("balance-copy").wait_for()
    # It opens on much text of one kind, where the point shows, not on a dozen tokens.
    assert numbers(page, "own")["max-violation"] < numbers(page, "copy")["max-violation"]
    page.get_by_test_id("own-text").click()
    settle(page)

    ids = token_ids(page)
    for name, folder in (("own", BOX / "tiny"), ("copy", COPY)):
        model = moescope.load(folder)
        trace = record("", model.network, model.tokenizer, ids, len(ids))
        routers = [layer.router for layer in trace.layers if layer.router is not None]
        loads = [[float(count) for count in router.load] for router in routers]
        assert numbers(page, name) == pytest.approx(expected(loads), rel=1e-3)

    history = [
        json.loads((BOX / n / "training_history.json").read_text()) for n in ("tiny", COPY.name)
    ]
    note = page.get_by_test_id("balance-note").inner_text()
    for one in history:
        assert f"{one['rows'][-1]['step']:,}" in note

    kind = 1
    page.get_by_test_id("domain").nth(kind).click()
    settle(page)
    for name, folder in (("own", BOX / "tiny"), ("copy", COPY)):
        measured = Specialization.from_file(folder / "specialization.json")
        assert numbers(page, name) == pytest.approx(expected(measured.load[kind]), rel=1e-2)
    assert numbers(page, "own")["max-violation"] < numbers(page, "copy")["max-violation"]
    largest = float(page.get_by_test_id("heat-legend").get_attribute("data-most"))
    assert largest > 1 + numbers(page, "copy")["max-violation"]

    page.get_by_test_id("compare-balance").uncheck()
    assert page.get_by_test_id("balance-copy").count() == 0
