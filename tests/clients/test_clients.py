"""The clients that people use, in the modes that agents need, against a real server process."""

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import ask, process, save_tool_caller
from transformers import AutoModelForCausalLM

from moescope.api import Model
from moescope.text.tokenizer import Tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"
CLIENTS = ("openai", "anthropic", "langchain", "litellm", "pydantic_ai", "instructor", "ollama")
NODE = Path(__file__).parent / "node" / "node_modules"
NODE_CLIENTS = ("openai", "ai_responses", "ai_chat", "ai_compatible")
PARTS = 8
"""In which schemathesis looks at the server: a path or three each, a minute or so."""

pytestmark = pytest.mark.slow
from_pypi = pytest.mark.skipif(
    not PYTHON.exists(), reason="no .venv-clients; make test-all makes it"
)


@pytest.fixture(scope="module")
def home(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose template teaches tools."""
    home = tmp_path_factory.mktemp("served") / "small"
    save_tool_caller(model, home, positions=8192)
    return home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """A server process over it."""
    with process(home, env={**os.environ, "MOESCOPE_API_KEY": "sesame"}) as (_, port):
        yield f"http://127.0.0.1:{port}"


@from_pypi
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_served(url: str, client: str) -> None:
    asked = [str(PYTHON), str(Path(__file__).with_name("ask.py")), client, url]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    told = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=environment)
    assert told.returncode == 0, told.stderr[-3000:]


QUESTIONS = [
    {"question": "Which is a colour?", "choices": ["red", "seven"], "answer": 0},
    {"question": "月亮在哪里？", "choices": ["在天上", "在盒子里", "frost 😀"], "answer": 0},
    {"question": "Is ice warm?", "choices": ["yes", "no", "it is frost", "床"], "answer": 1},
]
PAGES = ["the moon before my bed, is it frost?\n" * 3, "床前明月光，疑是地上霜。", "😀 is it 7?"]


@from_pypi
def test_lm_evaluation_harness_scores_as_transformers_does(
    url: str, home: Path, tmp_path: Path
) -> None:
    pages = [{"page": page} for page in PAGES]
    for name, rows in (("questions", QUESTIONS), ("pages", pages)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    asked = [str(PYTHON), str(Path(__file__).with_name("score.py")), url]
    asked += [str(tmp_path / f"{name}.jsonl") for name in ("questions", "pages")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OPENAI_API_KEY": "sesame", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(asked, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])

    peer, tokenizer = AutoModelForCausalLM.from_pretrained(home), Tokenizer.load(home)

    def logprobs(context: list[int], ids: list[int]) -> tuple[float, bool]:
        with torch.inference_mode():
            logits = peer(torch.tensor([[*context, *ids]])).logits[0]
        known = logits.double().log_softmax(-1)[len(context) - 1 : -1]
        own = known.gather(1, torch.tensor(ids)[:, None])[:, 0]
        return float(own.sum()), known.argmax(-1).tolist() == ids

    right = 0
    for question, answers in zip(QUESTIONS, told["samples"]["own_arc_easy"], strict=True):
        context = tokenizer.encode(f"Question: {question['question']}\nAnswer:")
        expected: list[float] = []
        for choice, answer in zip(question["choices"], answers, strict=True):
            text = f"Question: {question['question']}\nAnswer: {choice}"
            summed, greedy = logprobs(context, tokenizer.encode(text)[len(context) :])
            assert answer[0] == pytest.approx(summed, abs=1e-3) and answer[1] == greedy
            expected.append(summed)
        right += expected.index(max(expected)) == question["answer"]
    assert told["results"]["own_arc_easy"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    first = [tokenizer.begin_ids[0] or tokenizer.eos_id]  # it takes a begin token of id 0 for none
    whole = [logprobs(first, tokenizer.encode(page))[0] for page in PAGES]
    for (answer,), summed in zip(told["samples"]["own_wikitext"], whole, strict=True):
        assert float(answer) == pytest.approx(summed, abs=1e-2)
    bits = -sum(whole) / math.log(2) / sum(len(page.encode()) for page in PAGES)
    measured = told["results"]["own_wikitext"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits, rel=1e-4)


@pytest.mark.skipif(not NODE.exists(), reason="no clients from npm; make test-all brings them")
@pytest.mark.parametrize("client", NODE_CLIENTS)
def test_a_client_from_npm_is_served(url: str, client: str) -> None:
    asked = ["node", "ask.mjs", client, url]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=280, cwd=NODE.parent)
    assert told.returncode == 0, told.stderr[-3000:]


@pytest.fixture(scope="module")
def paths(url: str) -> list[str]:
    """All of what the server's OpenAPI document describes."""
    return sorted(ask(int(url.rpartition(":")[2]), "/openapi.json")["paths"])


@from_pypi
@pytest.mark.parametrize("part", range(PARTS))
def test_schemathesis_finds_no_failure_of_the_server(
    url: str, paths: list[str], tmp_path: Path, part: int
) -> None:
    asked = [str(PYTHON.with_name("st")), "run", f"{url}/openapi.json", "--max-examples", "15"]
    for path in paths[part::PARTS]:
        asked += ["--include-path", path]
    asked += ["--checks", "not_a_server_error", "-H", "Authorization: Bearer sesame"]
    asked += ["--generation-deterministic", "--request-timeout", "60", "--no-color"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    told = subprocess.run(
        asked, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-500:]
