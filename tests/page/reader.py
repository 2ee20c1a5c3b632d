"""What a reader does and sees, for tests: type, wait, move a slider, read off numbers."""

LANGUAGES = ["zh", "en"]
TEXT = {"zh": "床前明月光，", "en": "It is a truth universally acknowledged, that"}
STATIONS = [
    *("prompt", "language", "steps", "flow", "tokens", "attention", "context", "router", "relu"),
    *("experts", "fine", "merge", "next", "whatif", "balance", "dense", "thinking", "reasoning"),
    *("training", "service", "summary"),
]
PLAYED = 240_000
"""Milliseconds that a text may take on a machine that is busy with other things."""


def settle(page) -> None:
    """Wait until nothing has been asked of the server for a while."""
    quiet = 0
    while quiet < 8:  # longer than the page waits for further changes before it asks
        page.wait_for_timeout(40)
        quiet = 0 if page.asked else quiet + 1


def candidates(page) -> dict[int, float]:
    """The next tokens on the page, by id."""
    return {
        int(row.get_attribute("data-token-id")): float(row.get_attribute("data-probability"))
        for row in page.get_by_test_id("candidate").all()
    }


def token_ids(page) -> list[int]:
    return [int(chip.get_attribute("data-token-id")) for chip in page.get_by_test_id("token").all()]


def write(page, text: str) -> None:
    """Type a text, play, and wait for the end of the stream."""
    page.get_by_test_id("prompt").fill(text)
    play = page.get_by_test_id("play")
    play.click()
    page.locator("[data-testid=play][aria-pressed=true]").wait_for()
    page.locator("[data-testid=play][aria-pressed=false]").wait_for(timeout=PLAYED)
    settle(page)


def set_slider(page, testid: str, value: float) -> None:
    page.get_by_test_id(testid).evaluate(
        "(input, value) => { input.value = value;"
        " input.dispatchEvent(new Event('input', { bubbles: true })) }",
        value,
    )
    settle(page)


def save(page, station: str, folder) -> str:
    """The station's picture as the reader saves it."""
    section = page.get_by_test_id(f"station-{station}")
    menu = section.get_by_test_id("save-menu")
    if menu.get_attribute("open") is None:
        menu.locator("summary").click()
    with page.expect_download() as download:
        section.get_by_test_id("save-svg").click()
    file = folder / f"{station}.svg"
    download.value.save_as(file)
    return file.read_text(encoding="utf-8")
