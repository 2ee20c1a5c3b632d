"""The clients that people use, in the modes that agents need, against a real server process."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import process, save_tool_caller

from moescope.api import Model

PYTHON = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"
CLIENTS = ("openai", "anthropic", "langchain", "litellm", "pydantic_ai", "instructor", "ollama")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-clients; make test-all makes it"),
]


@pytest.fixture(scope="module")
def url(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process, over a small model whose template teaches tools."""
    home = tmp_path_factory.mktemp("served") / "small"
    save_tool_caller(model, home, positions=8192)
    with process(home, env={**os.environ, "MOESCOPE_API_KEY": "sesame"}) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_served(url: str, client: str) -> None:
    asked = [str(PYTHON), str(Path(__file__).with_name("ask.py")), client, url]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    told = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=environment)
    assert told.returncode == 0, told.stderr[-3000:]


def test_schemathesis_finds_no_failure_of_the_server(url: str, tmp_path: Path) -> None:
    asked = [str(PYTHON.with_name("st")), "run", f"{url}/openapi.json", "--max-examples", "15"]
    asked += ["--checks", "not_a_server_error", "-H", "Authorization: Bearer sesame"]
    asked += ["--generation-deterministic", "--request-timeout", "60", "--no-color"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    told = subprocess.run(
        asked, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-500:]
