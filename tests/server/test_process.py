"""A real server process: slow clients, signals, and what they leave behind."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from served import ask, kilobytes, process, said, save_tool_caller

from moescope.api import Model


def closed_after(connection: socket.socket) -> float:
    begun = time.monotonic()
    connection.settimeout(20)
    while connection.recv(4096):
        pass
    return time.monotonic() - begun


def test_who_sends_nothing_or_half_is_closed(home: Path) -> None:
    with process(home, "--patience", "1") as (server, port):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 999\r\n\r\n"
        for begun in (b"", head[:40].encode(), head.encode(), (head + '{"prompt"').encode()):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(begun)
                assert 0.5 < closed_after(connection) < 10
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(head.encode())
        assert ask(port, "/health") == {"status": "ok"}
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0 and said(server) == ""


def test_it_answers_at_its_limit_of_open_files(home: Path) -> None:
    resource = pytest.importorskip("resource", reason="no such limits here")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    asked = {"prompt": "the moon", "max_tokens": 3, "temperature": 0}
    with process(home, preexec_fn=limit) as (server, port):
        alone = ask(port, "/v1/completions", asked)["choices"]
        with ExitStack() as idle:
            for number in range(300):
                idle.enter_context(socket.create_connection(("127.0.0.1", port)))
                if number % 50 == 49:
                    assert ask(port, "/health") == {"status": "ok"}
                    assert ask(port, "/v1/completions", asked)["choices"] == alone
        assert ask(port, "/v1/completions", asked)["choices"] == alone
        assert said(server) == ""


def opened(port: int, asked: dict[str, Any]) -> HTTPResponse:
    """The answer to a completion, while it is made."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


def ended(server: subprocess.Popen[str]) -> None:
    """See that a signal ended a server, and that it said nothing."""
    server.wait(timeout=60)
    assert said(server) == ""
    server.returncode = 0  # a signal ended it, as it should


@pytest.fixture(scope="module")
def long(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose texts take minutes."""
    home = tmp_path_factory.mktemp("long") / "m"
    save_tool_caller(model, home, 65_536)
    return home


def test_what_runs_may_end_in_the_time_of_grace(long: Path) -> None:
    asked = {"prompt": "the moon", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with process(long, "--grace", "60") as (server, port):
        with opened(port, asked) as answer:
            assert answer.readline().startswith(b"data: ")
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert refusal.value.code == 503 and ask(port, "/health") == {"status": "ok"}
            rest = answer.read().decode().strip().splitlines()
        assert rest[-1] == "data: [DONE]"
        ended(server)


@pytest.mark.parametrize(("grace", "signals"), [("0", 1), ("0.1", 1), ("60", 2)])
def test_what_is_cut_ends_as_an_answer(long: Path, grace: str, signals: int) -> None:
    asked: dict[str, Any] = {"prompt": "the moon", "max_tokens": 60_000, "ignore_eos": True}
    with process(long, "--grace", grace) as (server, port):
        with ThreadPoolExecutor() as pool, opened(port, asked | {"stream": True}) as answer:
            assert answer.readline().startswith(b"data: ")
            whole = pool.submit(opened, port, asked)
            time.sleep(0.5)
            for _ in range(signals):
                server.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            rest = answer.read().decode().strip().splitlines()
            assert "shutting down" in json.loads(rest[-1][6:])["error"]["message"]
            with pytest.raises(urllib.error.HTTPError) as refusal:
                whole.result()
            assert refusal.value.code == 503
        ended(server)


def test_a_body_that_does_not_come_is_told_of_the_end(long: Path) -> None:
    with process(long, "--grace", "0", "--patience", "50") as (server, port):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 999\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode())
            time.sleep(0.5)
            server.send_signal(signal.SIGTERM)
            connection.settimeout(30)
            assert b" 503 " in connection.recv(4096)
        server.wait(timeout=60)
        assert "Traceback" not in said(server)
        server.returncode = 0


def test_beyond_this_machine_a_key_is_needed(home: Path) -> None:
    script = "from moescope.cli.main import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(home), "--host", "0.0.0.0"]
    refused = subprocess.run([*arguments, "--port", "0"], capture_output=True, text=True)
    assert refused.returncode == 2 and "say --insecure" in refused.stderr
    with process(home, "--host", "0.0.0.0", "--insecure") as (server, port):
        assert ask(port, "/v1/models")["data"]
        assert server.line.split()[4] == f"http://0.0.0.0:{port}/v1"


def test_a_template_that_never_ends_leaves_health_and_signals_alive(
    home: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(home, tmp_path / "m")
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(loops)
    with process(tmp_path / "m", "--grace", "0") as (server, port):
        asked = json.dumps({"messages": [{"role": "user", "content": "x"}]})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall((head + asked).encode())
            time.sleep(1)
            begun = time.monotonic()
            assert ask(port, "/health") == {"status": "ok"}
            assert time.monotonic() - begun < 2
            assert b" 400 " in connection.recv(4096)
            connection.sendall((head + asked).encode())
            time.sleep(0.5)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=20) == 0


def test_a_body_of_wrong_types_costs_little(home: Path) -> None:
    with process(home) as (server, port):
        if not Path("/proc/self/status").exists():
            pytest.skip("no /proc")
        ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 1})
        before = kilobytes(server.pid, "VmHWM")
        wrong: list[Any] = [{"a": 1}, 1.5, [None]]
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(port, "/v1/completions", {"prompt": wrong * 100_000})
        assert refusal.value.code == 400
        assert kilobytes(server.pid, "VmHWM") - before < 200_000  # kB; the body has 2 MB
