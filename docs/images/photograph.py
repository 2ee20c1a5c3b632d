"""Take pictures of the page's stations: `python docs/images/photograph.py`.

Needs Chromium and a font with Chinese characters. A server with the model in the box is started;
what is seen was computed while the picture was taken.
"""

import io
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent / "page"
TEXTS = {
    "zh": "春眠不觉晓，",
    "en": "It is a truth universally acknowledged, that a single man",
}
STATIONS = [
    *("prompt", "flow", "tokens", "attention", "router", "experts", "merge", "next"),
    *("balance", "dense", "relu", "fine", "thinking", "reasoning", "training", "summary", "whatif"),
]
FIRST_SCREENS = {"1280": (1280, 900), "390": (390, 844)}
LOOKED_AT = 8
"""The token that is selected."""


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moescope")), "open", "--no-browser"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()  # its address: it answers from now on
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for language, text in TEXTS.items():
                for name, (width, height) in FIRST_SCREENS.items():
                    page = browser.new_page(viewport={"width": width, "height": height})
                    page.goto(f"http://127.0.0.1:{port}/?lang={language}")
                    page.get_by_test_id("hero-lead").wait_for()
                    page.wait_for_timeout(2500)
                    save(page.screenshot(), HERE / f"{language}.first.{name}.png")
                    page.close()
                page = browser.new_page(viewport={"width": 1120, "height": 2000})
                page.set_default_timeout(120_000)
                page.goto(f"http://127.0.0.1:{port}/?lang={language}")
                explore(page, text)
                for station in STATIONS:
                    if station == "whatif":  # last, because it changes all others
                        switch_off(page, "arithmetic")
                    photograph(page, station, HERE / f"{language}.{station}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def explore(page: Page, text: str) -> None:
    """Type, play, select a token, and press the buttons that compute something more."""
    page.get_by_test_id("prompt").fill(text)
    page.get_by_test_id("play").click()
    page.locator("[data-testid=play][aria-pressed=true]").wait_for()
    page.locator("[data-testid=play][aria-pressed=false]").wait_for()
    page.get_by_test_id("token").nth(LOOKED_AT).click()
    page.get_by_test_id("think").click()
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("with-and-without").click()
    page.locator("[aria-busy=false] .answer strong").wait_for()
    page.get_by_test_id("dense-moe").and_(page.locator(":enabled")).wait_for()
    page.locator("[data-testid=reasoning-results][aria-busy=false][data-thought]").wait_for()
    page.mouse.move(0, 0)  # a hovered part looks otherwise
    # The bar of tokens stays in sight on the page and would stand before the pictures.
    page.add_style_tag(content="div.bar { position: static !important }")


def switch_off(page: Page, domain: str) -> None:
    """Switch off all experts of a domain, and wait for what is written with and without them."""
    page.get_by_test_id(f"off-{domain}").click()
    page.locator("[data-testid=proof][aria-busy=false][data-after]").wait_for()
    page.get_by_test_id("whatif-verdict").wait_for()
    page.mouse.move(0, 0)


def photograph(page: Page, station: str, target: Path) -> None:
    """Save one station as it stands on the page."""
    section = page.get_by_test_id(f"station-{station}")
    section.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)  # what is asked for in sight has come, and bars stand still
    save(section.screenshot(), target)


def save(png: bytes, target: Path) -> None:
    """Save a picture with few colours, the rare ones among them: they tell experts apart."""
    target.parent.mkdir(exist_ok=True)
    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    few.save(target, optimize=True)


if __name__ == "__main__":
    main()
