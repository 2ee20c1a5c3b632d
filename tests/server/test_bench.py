"""`moescope bench URL` against a real server process, and the numbers that it tells."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from served import nothing_runs, process, save_tool_caller

from moescope.api import Model
from moescope.cli.main import run
from moescope.lab.load import Answer, numbers

KEY = "sesame"


@pytest.fixture(scope="module")
def port(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    home = tmp_path_factory.mktemp("bench") / "small"
    save_tool_caller(model, home, positions=512)
    with process(home, "--cache-memory", "0.05") as (_, port):
        yield port


def told(capsys: pytest.CaptureFixture[str], port: int, *options: str) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/v1"
    small = ["--random-input-len", "40", "--random-output-len", "8", "--max-concurrency", "3"]
    assert run(["bench", url, *small, *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_server_is_asked_and_its_numbers_told(
    capsys: pytest.CaptureFixture[str], port: int, endpoint: str
) -> None:
    found = told(capsys, port, "--num-prompts", "7", "--ignore-eos", "--endpoint", endpoint)
    assert (found["completed"], found["failed"], found["hung_up"]) == (7, 0, 0), found
    assert found["model"] == "small" and found["total_output_tokens"] == 7 * 8
    assert 30 < found["total_input_tokens"] / 7 < 60
    assert 0 < found["median_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert found["output_throughput"] == pytest.approx(56 / found["duration"])


def test_who_leaves_leaves_nothing_behind(capsys: pytest.CaptureFixture[str], port: int) -> None:
    found = told(capsys, port, "--duration", "1", "--hang-up", "0.5", "--ignore-eos")
    assert found["hung_up"] and found["completed"] and not found["failed"]
    nothing_runs(port)


def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], home: Path, port: int) -> None:
    assert run(["bench", "http://127.0.0.1:1"]) == 2
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert run(["bench", "nowhere"]) == 2
    assert "no server answers at nowhere" in capsys.readouterr().err
    asked = ["bench", f"http://127.0.0.1:{port}", "--model", "other"]
    assert run(asked) == 2
    assert "there is no model 'other' here" in capsys.readouterr().err
    with process(home, "--api-key", KEY) as (_, closed):
        assert run(["bench", f"http://127.0.0.1:{closed}"]) == 2
        assert "wants a key" in capsys.readouterr().err


def test_a_table_is_drawn(capsys: pytest.CaptureFixture[str], port: int) -> None:
    assert run(["bench", f"http://127.0.0.1:{port}", "--num-prompts", "2"]) == 0
    assert "time to first token" in capsys.readouterr().out


@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=9), min_size=1, max_size=9))
def test_numbers_are_numpys(times: list[list[float]]) -> None:
    answers = [Answer(0.0, sorted(pieces), 5, len(pieces)) for pieces in times]
    left = Answer(0.0, [1.0, 2.0], hung_up=True)
    found = numbers([*answers, left, Answer(0.0, error="status 400")], 2.0)
    firsts = [min(pieces) for pieces in times] + [1.0]
    gaps = np.concatenate([np.diff(sorted(pieces)) for pieces in times] + [[1.0]])
    ends = [max(pieces) for pieces in times]
    for name, values in {"ttft": firsts, "itl": gaps, "e2el": ends}.items():
        assert found[f"median_{name}_ms"] == pytest.approx(1e3 * np.median(values))
        assert found[f"p99_{name}_ms"] == pytest.approx(1e3 * np.percentile(values, 99))
        assert found[f"mean_{name}_ms"] == pytest.approx(1e3 * np.mean(values))
    assert (found["completed"], found["hung_up"], found["failed"]) == (len(times), 1, 1)
    assert found["output_throughput"] == (sum(map(len, times)) + 2) / 2
