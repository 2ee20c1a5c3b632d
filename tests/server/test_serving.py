"""Ports, addresses, and a real server from the command line until Ctrl-C."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from questions import write_run

from moescope.api import Model
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.server import serving
from moescope.server.apis import Access
from moescope.server.model_thread import ModelThread
from moescope.server.serving import has_display, listen, shown_beside

OPTIONS: dict[str, Any] = {"name": "x", "access": Access(), "insecure": False, "grace": 1.0}
OPTIONS["max_batch"] = 1


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_the_next_free_port_is_taken(busy_port: int) -> None:
    with listen("127.0.0.1", busy_port) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # or every answer waits 40 ms
        assert busy_port < listener.getsockname()[1] <= busy_port + serving.PORTS_TRIED


def test_a_busy_port_and_a_foreign_address_are_sentences(busy_port: int) -> None:
    with pytest.raises(UserError, match=r"cannot listen at 203\.0\.113\.1 .*address of this"):
        listen("203.0.113.1", 0)
    with pytest.raises(UserError, match=f"port {busy_port} is busy; give another"):
        listen("127.0.0.1", busy_port, tries=1)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="they always have a display")
def test_a_display_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_display()


def test_open_shows_the_model_until_ctrl_c(home: Path, busy_port: int, tmp_path: Path) -> None:
    write_run(tmp_path, steps=4)
    script = "from moescope.cli.main import main; main()"
    arguments = ["open", str(home), "--port", str(busy_port), "--no-browser"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--watch", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert f"port {busy_port} is busy; taking" in process.stdout.readline()
        line = process.stdout.readline()
        assert f"moescope shows {home} at http://127.0.0.1:" in line
        address = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}/api/model") as answer:
            info = json.load(answer)
        assert info["watching"] and info["num_experts_per_tok"] == 3
        live = urllib.request.urlopen(f"{address}/api/training/live")
        event = json.loads(live.readline().removeprefix(b"data: "))
        assert (event["type"], event["row"]["step"], event["steps"]) == ("row", 4, 4)
        process.send_signal(signal.SIGINT)  # while the live stream is open
        assert process.wait(timeout=300) == 0
        assert process.stderr.read() == ""


def test_a_training_is_shown_beside_it_and_no_longer(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    write_run(tmp_path, steps=2)
    said: list[str] = []
    with shown_beside(tmp_path, said.append, model=str(home)):
        address = said[-1].split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}/api/training") as answer:
            assert [row["step"] for row in json.load(answer)["rows"]] == [1, 2]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/api/training")


def test_open_says_in_a_sentence_that_there_is_no_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moescope.cli.main import run

    assert run(["open", "nowhere"]) == 2
    assert "there is no model 'nowhere'" in capsys.readouterr().err


def test_serve_needs_no_extension(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.extension, "native", None)
    made: list[ModelThread] = []
    monkeypatch.setattr(serving, "create_api", lambda _model, of, **_: made.append(of))
    monkeypatch.setattr(serving, "_run", lambda _app, listener, **_: listener.close())
    serving.serve_api(model, "127.0.0.1", 0, print, **OPTIONS)
    made[0].close()


def test_an_empty_key_in_the_environment_is_not_taken_for_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moescope.cli.main import run

    monkeypatch.setenv("MOESCOPE_API_KEY", "")
    assert run(["serve", str(home), "--port", "0"]) == 2
    assert "MOESCOPE_API_KEY is set but empty" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "sésame", "a\nb", " sesame", "sesame "])
def test_a_key_that_no_client_can_send_is_a_sentence(model: Model, key: str) -> None:
    with pytest.raises(UserError, match="use plain ASCII"):
        serving.serve_api(model, "127.0.0.1", 0, print, **{**OPTIONS, "access": Access(key)})


def test_serve_answers_openais_clients_until_ctrl_c(home: Path, busy_port: int) -> None:
    script = "from moescope.cli.main import main; main()"
    arguments = [sys.executable, "-c", script, "serve", str(home)]
    refused = subprocess.run(
        [*arguments, "--port", str(busy_port)], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert refused.stderr == (f"moescope: port {busy_port} is busy; give another one with --port\n")
    with subprocess.Popen(
        [*arguments, "--port", "0", "--api-key", "sesame"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = line.split()[4]
        assert line.startswith("moescope serves small at http://127.0.0.1:")
        request = urllib.request.Request(
            f"{address}/completions",
            data=json.dumps({"prompt": "the moon", "max_tokens": 4}).encode(),
            headers={"Content-Type": "application/json", "Authorization": "Bearer sesame"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            made = json.load(answer)
        assert made["model"] == "small" and made["usage"]["completion_tokens"] <= 4
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
