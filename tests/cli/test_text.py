"""generate, chat and tokenizer: what they print, and how they end."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moescope.api import Model
from moescope.cli.main import run
from moescope.engine.runner import Runner
from moescope.engine.scheduler import Chunk
from moescope.engine.sequence import Token
from moescope.text.tokenizer import Tokenizer


def test_generate_prints_the_prompt_and_its_continuation(
    model: Model, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "the moon", "--model", folder, "--max-tokens", "9"]) == 0
    expected = "the moon" + model.generate("the moon", max_tokens=9).text + "\n"
    assert capsys.readouterr().out == expected


def test_generate_json_tells_ids_logprobs_and_why_it_ended(
    model: Model, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", folder, "--max-tokens", "5", "--temperature", "1.5", "--seed", "3"]
    assert run(["generate", "the moon", *options, "--top-k", "40", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = model.generate("the moon", max_tokens=5, temperature=1.5, seed=3, top_k=40)
    assert told["text"] == expected.text
    assert told["ids"] == [token.id for token in expected.tokens]
    assert told["prompt_tokens"] == expected.prompt_tokens
    assert told["finish_reason"] == expected.finish_reason
    assert len(told["logprobs"]) == len(told["ids"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "x", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
        (["generate"], "missing argument"),
        (["explain", "x", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["explain", "--json"], "--json needs a PROMPT"),
        (["chat", "--json"], "--json needs a MESSAGE"),
        (["chat", "hi", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["tokenizer", "train", "nowhere", "--out", "x"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_chat_answers_once_and_ends_without_a_terminal(
    model: Model,
    folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["chat", "is it frost?", "--model", folder, "--max-tokens", "8"]) == 0
    asked = model.tokenizer.apply_chat_template([{"role": "user", "content": "is it frost?"}])
    assert capsys.readouterr().out == model.generate(asked, max_tokens=8).text + "\n"


def test_chat_json_is_the_answer_and_why_it_ended(
    model: Model, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "is it frost?", "--model", folder, "--max-tokens", "8", "--json"]) == 0
    asked = model.tokenizer.apply_chat_template([{"role": "user", "content": "is it frost?"}])
    expected = model.generate(asked, max_tokens=8)
    assert json.loads(capsys.readouterr().out) == {
        "reasoning_content": "",
        "answer": expected.text,
        "finish_reason": expected.finish_reason,
    }


def test_chat_prints_tabs_and_line_ends_as_they_are_made(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["all:\r\n", "\tcc [bold]x[/] :smile:", "\ty"]
    tokens = [Token(0, 65, text, 0.0, "stop" if text == pieces[-1] else None) for text in pieces]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(Model, "stream", lambda *_, **__: iter(tokens))
    assert run(["chat", "hi", "--model", folder]) == 0
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    monkeypatch.setattr(Model, "stream", lambda *_, **__: iter(()))
    assert run(["chat", "hi", "--model", folder, "--max-tokens", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "length"


def test_chat_prints_a_thought_before_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    thought = "7+5=12 write 2 carry 1\n1+2+1=4\n17+25=42"
    assert run(["chat", "17+25=?"]) == 0
    assert capsys.readouterr().out == f"{thought}\n42\n"
    assert run(["chat", "17+25=?", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"reasoning_content": thought, "answer": "42", "finish_reason": "stop"}


def test_chat_remembers_what_was_said(
    model: Model,
    folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("is\nit\n\n"))
    read: list[int] = []
    compute = Runner.run

    def counted(runner: Runner, chunks: list[Chunk], *given: Any) -> Tensor:
        read.append(sum(chunk.count for chunk in chunks))
        return compute(runner, chunks, *given)

    monkeypatch.setattr(Runner, "run", counted)
    assert run(["chat", "--model", folder, "--max-tokens", "4", "--system", "be " * 9]) == 0
    monkeypatch.undo()
    messages = [{"role": "system", "content": "be " * 9}, {"role": "user", "content": "is"}]
    first = model.generate(model.tokenizer.apply_chat_template(messages), max_tokens=4).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "it"}]
    second = model.generate(model.tokenizer.apply_chat_template(messages), max_tokens=4).text
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    whole = len(model.engine.encode(model.tokenizer.apply_chat_template(messages)))
    begins, *rest = read
    assert max(rest) <= whole - begins + 1  # the second turn is read from where the first ended


def test_a_learned_tokenizer_is_saved_and_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("床前明月光，疑是地上霜。the moon\n" * 50, encoding="utf-8")
    options = ["--vocab-size", "280", "--out", str(tmp_path / "out"), "--json"]
    assert run(["tokenizer", "train", str(tmp_path / "text.txt"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 280
    assert Tokenizer.load(tmp_path / "out").vocab_size == 280


def test_options_steer_the_router(
    model: Model, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-experts-per-tok", "2", "--disable-expert", "1:3", "--disable-expert", "2:0"]
    options += ["--force-expert", "1:5", "--router-rule", "softmax", "--router-noise", "0.5"]
    steered = model.steer(
        num_experts_per_tok=2,
        disabled={(1, 3), (2, 0)},
        forced={(1, 5)},
        rule="softmax",
        noise=0.5,
    )
    for verb in ("generate", "chat", "explain"):
        assert (
            run([verb, "the moon", "--model", folder, *options, "--max-tokens", "9", "--json"]) == 0
        )
        told = json.loads(capsys.readouterr().out)
        if verb == "generate":
            made = steered.generate("the moon", max_tokens=9)
            assert told["ids"] == [token.id for token in made.tokens]
        if verb == "explain":
            assert all(5 in ids for ids in told["layers"][1]["router"]["topk_ids"])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--disable-expert", "1"], "'1' names no expert; write LAYER:ID"),
        (["--force-expert", "1:x"], "'1:x' names no expert"),
        (["--force-expert", "1:8"], "there is no expert 8 in layer 1; its experts are 0 to 7"),
        (["--num-experts-per-tok", "9"], "num_experts_per_tok is 9; the model has 1 to 8"),
        (["--router-rule", "best"], "rule is 'best'; choose from softmax"),
        (["--router-noise", "-1"], "noise is -1.0; it must be 0 or more"),
    ],
)
def test_a_steering_mistake_is_one_sentence(
    folder: str, option: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "x", "--model", folder, *option]) == 2
    assert sentence in capsys.readouterr().err
