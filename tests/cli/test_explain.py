"""The picture in the terminal: 80 columns, no colour needed, either language."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from moescope.api import Model
from moescope.cli.drawing import draw
from moescope.cli.main import run
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.trace import Trace

ENGLISH, CHINESE = "the moon before my bed", "床前明月光"


def drawn(model: Model, text: str, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    trace = model.trace(text, max_tokens=4)
    draw(trace, model.tokenizer, Console(file=file, width=width, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("width", [80, 200])
def test_no_line_is_wider_than_80_columns(model: Model, text: str, width: int) -> None:
    lines = drawn(model, text, width).splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80


def test_labels_are_in_the_language_of_the_prompt(model: Model) -> None:
    assert "leading expert" in drawn(model, ENGLISH)
    assert "首选专家" in drawn(model, CHINESE)
    trace = model.trace(ENGLISH, max_tokens=4)
    (moon,) = model.tokenizer.encode("月")[-1:]
    trace.tokens[-1] = replace(trace.tokens[-1], id=moon)  # what follows may be in any language
    file = io.StringIO()
    draw(trace, model.tokenizer, Console(file=file, width=80))
    assert "leading expert" in file.getvalue()


def test_characters_of_several_tokens_are_whole_where_text_is_shown(model: Model) -> None:
    text = "鸑鷟"  # of bytes alone, as the vocabulary has neither
    assert "\ufffd" in "".join(token.text for token in model.trace(text, max_tokens=0).tokens)
    shown = drawn(model, text)
    assert f"续写: {text} ▸" in shown and "首选专家" in shown


def test_each_token_has_its_leading_experts_in_its_row(model: Model) -> None:
    trace, picture = model.trace(ENGLISH, max_tokens=4), drawn(model, ENGLISH)
    rows = picture.split("L2", 1)[1].splitlines()[1:]
    for number in range(len(trace.tokens)):
        leading = [layer.router.topk_ids[number][0] for layer in trace.layers if layer.router]
        numbers = "\\s+".join(map(str, leading))
        assert re.search(rf"\s{numbers}\s+0\.0M", rows[number])
        assert rows[number].startswith("+" if number >= trace.prompt_tokens else " ")


def test_no_share_is_told_of_shared_experts_that_there_are_not(model: Model) -> None:
    assert " shared " in drawn(model, ENGLISH)
    config = read_config(config_fields(model.config) | {"n_shared_experts": 0})
    network = CausalLM(config)
    initialise(network, seed=0)
    assert " shared " not in drawn(Model("without", network, model.tokenizer), ENGLISH)


def test_colour_says_nothing_that_text_does_not(model: Model) -> None:
    """The same characters with colour and without."""
    coloured = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    draw(model.trace(ENGLISH, max_tokens=4), model.tokenizer, coloured)
    assert isinstance(coloured.file, io.StringIO)
    escaped = coloured.file.getvalue()
    assert "\x1b[" in escaped
    assert re.sub(r"\x1b\[[0-9;]*m", "", escaped) == drawn(model, ENGLISH)


def test_the_trace_is_printed_and_saved_as_json(
    model: Model, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json"
    options = ["--model", folder, "--max-tokens", "3", "--save", str(file), "--json"]
    assert run(["explain", ENGLISH, *options]) == 0
    printed = Trace.from_json(capsys.readouterr().out)
    assert printed == Trace.from_file(file)
    assert json.loads(file.read_text(encoding="utf-8"))["prompt_tokens"] == printed.prompt_tokens
    assert len(printed.tokens) == printed.prompt_tokens + 3


def test_without_a_prompt_each_line_of_input_is_explained(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ENGLISH}\n\n{CHINESE}\n"))
    assert run(["explain", "--model", folder]) == 0
    out = capsys.readouterr().out
    assert out.count("leading expert") == out.count("首选专家") == 1


def test_an_overlong_line_does_not_end_the_prompt(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'the moon ' * 200}\n{ENGLISH}\n"))
    assert run(["explain", "--model", folder]) == 0
    told = capsys.readouterr()
    assert "shorten it" in told.err
    assert "leading expert" in told.out
