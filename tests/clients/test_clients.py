"""The clients that people use, in the modes that agents need, against a real server process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from moescope.api import Model
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.text.tokenizer import Tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"
CLIENTS = ("openai", "anthropic", "langchain", "litellm", "pydantic_ai", "instructor", "ollama")
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-clients; make test-all makes it"),
]


@pytest.fixture(scope="module")
def url(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process, over a small model whose template teaches tools."""
    home = tmp_path_factory.mktemp("served") / "small"
    fields = config_fields(model.config) | {"max_position_embeddings": 8192, "vocab_size": 320}
    backend = BackendTokenizer.from_str(model.tokenizer._backend.to_str())
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    tokenizer = Tokenizer(backend, {**model.tokenizer._config, "chat_template": TEMPLATE})
    network = CausalLM(read_config(fields))
    initialise(network, seed=0)
    Model("small", network, tokenizer).save(home)
    script = "from moescope.cli.main import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(home), "--port", "0"]
    environment = {**os.environ, "MOESCOPE_API_KEY": "sesame"}
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, text=True, env=environment) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[4].removesuffix("/v1")
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


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
