"""A real server process, and what is asked of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as BackendTokenizer

from moescope.api import Model
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def save_tool_caller(model: Model, home: Path, positions: int) -> None:
    """A small model of random weights whose template teaches tools."""
    fields = config_fields(model.config)
    fields |= {"max_position_embeddings": positions, "vocab_size": 320}
    backend = BackendTokenizer.from_str(model.tokenizer._backend.to_str())
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    tokenizer = Tokenizer(backend, {**model.tokenizer._config, "chat_template": TEMPLATE})
    network = CausalLM(read_config(fields))
    initialise(network, seed=0)
    Model("small", network, tokenizer).save(home)


@contextmanager
def process(
    model: str | Path, *options: str, **more: Any
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`moescope serve` over a model, its process and its port."""
    script = "from moescope.cli.main import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(model), "--port", "0", *options]
    more.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})  # tests share the cores
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would fill up
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=errors, text=True, **more
        ) as server,
    ):
        server.stderr = errors
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("moescope serves"), said(server)
        server.line = line
        try:
            yield server, int(line.split()[4].rsplit(":", 1)[1].partition("/")[0])
        except BaseException:
            print(said(server)[-5000:])
            server.kill()
            raise
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0, said(server)


def said(server: subprocess.Popen[str]) -> str:
    """What a process has written to its stderr so far."""
    assert server.stderr is not None
    server.stderr.seek(0)
    return server.stderr.read()


def ask(port: int, path: str, asked: Any = None) -> Any:
    """Return what is answered, as JSON or text."""
    data = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = answer.read().decode()
    return json.loads(told) if told[:1] in "[{" else told


def gauge(port: int, name: str) -> float:
    """One of the numbers of /metrics."""
    lines = ask(port, "/metrics").splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


def nothing_runs(port: int, seconds: float = 10.0) -> None:
    """Wait until no text runs or waits and none of the cache is held; fail if that never comes."""
    names = ("moescope_requests_running", "moescope_requests_waiting", "moescope_cache_bytes")
    until = time.monotonic() + seconds
    while any(held := [gauge(port, name) for name in names]):
        assert time.monotonic() < until, dict(zip(names, held, strict=True))
        time.sleep(0.05)


def kilobytes(pid: int, field: str = "VmRSS") -> int:
    """Memory of a process, by its status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
