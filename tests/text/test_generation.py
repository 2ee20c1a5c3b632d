"""What a model's files say of its texts: when they end, and how they are drawn."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from starlette.testclient import TestClient
from transformers import GenerationConfig

import moescope
from moescope.api import Model
from moescope.cli.main import run
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.formats.gguf.generation import generation_defaults
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread
from moescope.text.generation import FILE, GenerationDefaults

R1 = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}
PROMPT = "床前明月光"


def folder_with(fields: Any, folder: Path) -> Path:
    (folder / FILE).write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "ends", "sampling"),
    [
        (R1, {1}, {"temperature": 0.6, "top_p": 0.95}),
        (
            {"eos_token_id": [5, 7], "do_sample": True, "top_k": 20, "repetition_penalty": 1.05},
            {5, 7},
            {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.05},
        ),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, set(), {"temperature": 0}),
        ({"temperature": 1.0, "top_k": 0, "min_p": 0.1}, set(), {"temperature": 1.0, "min_p": 0.1}),
        ({"_from_model_config": True, "pad_token_id": 0, "eos_token_id": None}, set(), {}),
    ],
)
def test_a_folder_says_when_texts_end_and_how_they_are_drawn(
    fields: Any, ends: set[int], sampling: dict[str, Any], tmp_path: Path
) -> None:
    told = GenerationDefaults.load(folder_with(fields, tmp_path))
    assert (told.end_ids, told.sampling) == (ends, sampling)
    told.save(tmp_path / "again")
    assert GenerationDefaults.load(tmp_path / "again") == told


def test_what_is_saved_says_the_same_in_transformers(tmp_path: Path) -> None:
    GenerationDefaults.load(folder_with(R1, tmp_path)).save(tmp_path)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.do_sample and theirs.temperature == 0.6 and theirs.top_p == 0.95
    assert theirs.eos_token_id == [1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', no id"),
        ({"eos_token_id": [1, -1]}, "no id of a token"),
        ({"temperature": "hot"}, "temperature is 'hot', but goes from 0 to 100"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ([], "holds no JSON object"),
    ],
)
def test_what_has_no_meaning_is_refused(fields: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{FILE}.*{words}"):
        GenerationDefaults.load(folder_with(fields, tmp_path))


def test_a_gguf_file_says_it_in_its_metadata() -> None:
    tokens = ["a", "<|im_end|>", "<|end|>", "</s>", "<|return|>", "<|call|>", "b", "<|user|>"]
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [normal, control, control, normal] + [control] * 4,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 6,
        gguf.Keys.General.SAMPLING_TEMP: 0.5,
        gguf.Keys.General.SAMPLING_TOP_K: 40,
        gguf.Keys.General.SAMPLING_PENALTY_REPEAT: 1.1,
    }
    told = generation_defaults(Path("m.gguf"), metadata)
    # "<|end|>" ends a part of an answer where "<|return|>" ends all; "</s>" is text here.
    assert told.end_ids == {0, 1, 4, 5, 6}
    assert told.sampling == {"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.1}
    metadata["tokenizer.ggml.tokens"] = [*tokens[:4], "c", *tokens[5:]]
    assert generation_defaults(Path("m.gguf"), metadata).end_ids == {0, 1, 2, 5, 6}


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    model.save(tmp_path)
    return tmp_path


def test_each_end_token_ends_a_text(saved: Path) -> None:
    whole = moescope.load(saved).generate(PROMPT, max_tokens=12)
    for at in (3, 6):
        folder_with({"eos_token_id": [299, whole.tokens[at].id]}, saved)
        ended = moescope.load(saved).generate(PROMPT, max_tokens=12)
        first = [token.id for token in whole.tokens].index(whole.tokens[at].id)
        assert ended.finish_reason == "stop" and len(ended.tokens) == first + 1
        steered = moescope.load(saved).steer(num_experts_per_tok=3)
        assert len(steered.generate(PROMPT, max_tokens=12).tokens) == first + 1
    unended = moescope.load(saved).generate(PROMPT, max_tokens=12, ignore_eos=True)
    assert unended.text == whole.text


def test_sampling_is_as_the_file_says_unless_asked_otherwise(saved: Path) -> None:
    plain = moescope.load(saved)
    folder_with({"do_sample": True, "temperature": 0.9, "top_k": 7}, saved)
    told = moescope.load(saved)
    asked: dict[str, Any] = {"max_tokens": 12, "seed": 3}
    drawn = plain.generate(PROMPT, temperature=0.9, top_k=7, **asked).text
    greedy = plain.generate(PROMPT, **asked).text
    assert drawn != greedy
    assert told.generate(PROMPT, **asked).text == drawn
    assert "".join(token.text for token in told.stream(PROMPT, **asked)) == drawn
    assert told.generate(PROMPT, temperature=0, **asked).text == greedy
    wide = plain.generate(PROMPT, temperature=0.9, **asked).text
    assert told.generate(PROMPT, top_k=None, **asked).text == wide
    told.save(saved / "again")
    assert moescope.load(saved / "again").generate(PROMPT, **asked).text == drawn


def test_the_command_line_does_likewise(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(*options: str) -> str:
        common = ["--model", str(saved), "--max-tokens", "12", "--seed", "3", "--json"]
        assert run(["generate", *common, *options, PROMPT]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    greedy = made()
    drawn = made("--temperature", "0.9", "--top-k", "7")
    folder_with({"do_sample": True, "temperature": 0.9, "top_k": 7}, saved)
    assert made() == drawn != greedy
    assert made("--temperature", "0") == greedy


def test_a_server_does_likewise(saved: Path) -> None:
    folder_with({"do_sample": True, "temperature": 0.9, "top_k": 7}, saved)
    told = moescope.load(saved)
    thread = ModelThread(told.engine, 4, 2**24)
    with TestClient(create_api(told, thread, name="m", access=Access("k"))) as client:

        def made(**asked: Any) -> str:
            question = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, **asked}
            headers = {"Authorization": "Bearer k"}
            answer = client.post("/v1/completions", json=question, headers=headers)
            return answer.json()["choices"][0]["text"]

        def expected(**sampling: Any) -> str:
            params = SamplingParams(max_tokens=12, seed=3, **sampling)
            return told.engine.generate([PROMPT], params)[0].text

        assert made() == expected(temperature=0.9, top_k=7)
        assert made(temperature=0) == expected()
        assert made(top_k=-1) == expected(temperature=0.9)
        assert made(top_p=0.5) == expected(temperature=0.9, top_k=7, top_p=0.5)


def test_a_greedy_file_makes_a_server_greedy(saved: Path) -> None:
    folder_with({"do_sample": False}, saved)
    told = moescope.load(saved)
    assert told.engine.defaults.sampling == {"temperature": 0}
    assert moescope.load("tiny").engine.defaults == GenerationDefaults()
