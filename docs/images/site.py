"""Take pictures of the documentation's site: `make docs && python docs/images/site.py`.

Needs Chromium and a font with Chinese characters. Whoever changes the site looks at them.
"""

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from photograph import save
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent / "site"
SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = {
    "start": "",
    **{page: f"{page}/" for page in ("architecture", "routers", "scaling", "api")},
}
LANGUAGES = {"en": "", "zh": "zh/"}


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    HERE.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        for language, folder in LANGUAGES.items():
            for name, path in PAGES.items():
                page.goto(f"http://127.0.0.1:{server.server_port}/{folder}{path}")
                page.wait_for_load_state("networkidle")
                save(page.screenshot(), HERE / f"{language}.{name}.png")
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
