"""The page in a real browser: Debian's Chromium, and a server with the model in the box."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from family_models import VARIANTS

import moescope
from moescope.api import Model
from moescope.catalog import BOX
from moescope.checkpoint import save_weights
from moescope.families import config_fields, open_config, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("MOESCOPE_PAGE_MODEL", "tiny")
"""What the server shows; another name or folder tries the page with another model."""
PATIENCE = 120.0
"""Seconds that the server may take to answer first."""


class Server:
    """`moescope open` on a free port, which a test may stop and start again."""

    def __init__(self, log: IO[str], model: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self._log, self._model = log, model
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = Path(sys.executable).with_name("moescope")
        self._process = subprocess.Popen(
            [str(command), "open", self._model, "--no-browser", "--port", str(self.port)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(self.address + "api/model", timeout=5).close()
                return
            time.sleep(0.1)
        self._log.seek(0)
        pytest.fail(f"`moescope open` does not answer; it said: {self._log.read().strip()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process = None


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return a way to start a server; all of them end with the session."""
    servers: list[Server] = []
    with contextlib.ExitStack() as logs:

        def start(model: str = MODEL) -> Server:
            folder = tmp_path_factory.mktemp("server")
            log = logs.enter_context((folder / "log.txt").open("w+", encoding="utf-8"))
            server = Server(log, model)
            servers.append(server)
            server.start()
            return server

        yield start
        for server in servers:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """A server that all tests share."""
    return start_server()


@pytest.fixture(scope="session")
def engine() -> Model:
    """The same model, asked without the page."""
    return moescope.load(MODEL)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of DeepSeek-V3's counts, 61 layers of 256 experts, and of next to no width."""
    shape = {
        **{"num_hidden_layers": 61, "first_k_dense_replace": 3},
        **{"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
        **{"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 8},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    }
    tiny = config_fields(open_config(BOX / "tiny" / "config.json"))
    network = CausalLM(read_config(tiny | shape))
    initialise(network, seed=0)
    folder = tmp_path_factory.mktemp("models") / "large"
    save_weights(network, folder, dtype=torch.bfloat16)
    Tokenizer.load(BOX / "tiny").save(folder)
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a way to make a small random checkpoint of a variant in `family_models`."""

    def make(variant: str) -> Path:
        tokenizer = Tokenizer.load(BOX / "tiny")
        fields = VARIANTS[variant].to_dict() | {"vocab_size": tokenizer.vocab_size}
        network = CausalLM(read_config(fields))
        initialise(network, seed=0)
        for name, tensor in network.state_dict().items():
            if name.endswith("tid2eid"):
                order = torch.rand(len(tensor), network.config.required("n_routed_experts"))
                tensor.copy_(order.topk(tensor.shape[1]).indices)
        folder = tmp_path_factory.mktemp("models") / variant
        save_weights(network, folder, dtype=torch.float32)
        tokenizer.save(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, driven by playwright; no other module may find its event loop running."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("the page is tested in Chromium, which is missing: apt install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the page's tests need playwright: pip install -e '.[dev]'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server: Server):
    """Return a way to open the page; at the end, its console must have stayed silent."""
    said: list[str] = []
    contexts = []

    def open_page(query: str = "", *, address=None, wait: str = "token", routes=None, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on(
            "console",
            lambda message: (
                said.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: said.append(str(error)))
        for url, answer in (routes or {}).items():
            page.route(url, answer)
        page.said = said
        page.asked = set()
        page.on("request", lambda request: "/api/" in request.url and page.asked.add(request))
        page.on("requestfinished", lambda request: page.asked.discard(request))
        page.on("requestfailed", lambda request: page.asked.discard(request))
        page.goto(f"{address or server.address}?{query}")
        page.get_by_test_id(wait).first.wait_for()
        if wait == "token":
            page.locator("main[aria-busy=false]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which finds what shuts people out."""
    script = ROOT / "web/node_modules/axe-core/axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.fail("axe-core is missing and so is npm: install Node 20.19 or newer")
        subprocess.run([npm, "ci"], cwd=ROOT / "web", check=True, capture_output=True)
    return script.read_text(encoding="utf-8")
