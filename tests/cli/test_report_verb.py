"""The verb: it says where the page is, and its mistakes in a sentence."""

import json
from pathlib import Path

import pytest

from moescope.api import Model
from moescope.cli.main import run
from moescope.scope.specialization import specialize
from moescope.text.documents import Document


def test_it_says_where_the_page_is(model: Model, tmp_path: Path, capsys) -> None:
    documents = [Document("床前明月光", "poems"), Document("the moon", "prose")]
    specialize("small", model.network, model.tokenizer, documents).save(tmp_path / "found.json")
    options = ["--out", str(tmp_path / "out"), "--language", "zh"]
    assert run(["report", str(tmp_path / "found.json"), *options]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert 'lang="zh"' in page.read_text(encoding="utf-8")
    assert run(["report", str(tmp_path / "found.json"), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.json", "--out", "x"], "cannot read nowhere.json"),
        (["found.json"], "missing option '--out'"),
        (["found.json", "--out", "x", "--language", "fr"], "'--language'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, capsys) -> None:
    assert run(["report", *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
