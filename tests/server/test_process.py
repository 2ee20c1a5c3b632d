"""A real server process: slow clients, signals, and what they leave behind."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from served import ask, kilobytes, process, said


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


def test_what_runs_may_end_in_the_time_of_grace(home: Path) -> None:
    asked = {"prompt": "the moon", "max_tokens": 40, "stream": True, "ignore_eos": True}
    for grace in ("30", "0.1"):
        with process(home, "--grace", grace) as (server, port):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                first = answer.readline()
                server.send_signal(signal.SIGTERM)
                rest = answer.read().decode().strip().splitlines()
            assert first.startswith(b"data: ")
            if "[DONE]" not in rest[-1]:
                assert (
                    grace == "0.1"
                    and "shutting down" in json.loads(rest[-1][6:])["error"]["message"]
                )
            server.wait(timeout=60)
            assert said(server) == ""
            server.returncode = 0  # a signal ended it, as it should


def test_beyond_this_machine_a_key_is_needed(home: Path) -> None:
    script = "from moescope.cli.main import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(home), "--host", "0.0.0.0"]
    refused = subprocess.run([*arguments, "--port", "0"], capture_output=True, text=True)
    assert refused.returncode == 2 and "say --insecure" in refused.stderr
    with process(home, "--host", "0.0.0.0", "--insecure") as (_, port):
        assert ask(port, "/v1/models")["data"]


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
