"""The verb: 80 columns for people, JSON for machines."""

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from moescope.cli.main import run
from moescope.scope.specialization import Specialization


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("texts")
    for domain, text in (
        ("poems", "床前明月光，疑是地上霜。"),
        ("english", "the moon, is it frost?"),
    ):
        (folder / domain).mkdir()
        lines = [json.dumps({"text": f"{text} {n}"}) for n in range(20)]
        (folder / domain / "text.jsonl").write_text("\n".join(lines))
    return folder


def test_a_map_of_each_layer_in_80_columns(folder: str, texts: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["specialize", folder, str(texts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80
    shown = "\n".join(lines)
    assert shown.count("\npoems") == shown.count("\nenglish") == 3  # two layers, the most devoted
    assert "2 layers of 8 experts" in shown
    assert "bits about the" in shown


def test_of_one_domain_nothing_is_told_that_takes_two(folder: str, texts: Path, capsys) -> None:
    assert run(["specialize", folder, str(texts / "english")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of one domain; give a folder with a subfolder for each" in shown
    assert "bits about" not in shown and "decides" in shown
    assert run(["specialize", folder, str(texts / "poems")]) == 0
    shown = capsys.readouterr().out
    assert "只有一个领域" in shown and "比特" not in shown


def test_labels_are_chinese_where_the_tokens_are(folder: str, texts: Path, capsys) -> None:
    assert run(["specialize", folder, str(texts / "poems")]) == 0
    assert "每层 8 个专家" in capsys.readouterr().out


def test_a_card_of_each_expert_in_80_columns(folder: str, texts: Path, capsys) -> None:
    assert run(["specialize", folder, str(texts), "--cards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80
    numbers = [line.split()[0] for line in lines if line.split() and line.split()[0].isdigit()]
    assert numbers == [str(expert) for expert in range(8)] * 2  # two layers


def test_json_is_printed_and_saved(folder: str, texts: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "found.json"
    assert run(["specialize", folder, str(texts), "--save", str(file), "--json"]) == 0
    printed = Specialization.from_json(capsys.readouterr().out)
    assert printed == Specialization.from_file(file)
    assert printed.documents == [20, 20]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "TEXTS"], "there is no model 'nowhere'"),
        (["MODEL", "nowhere"], "there is no file or folder nowhere"),
        (["MODEL", "TEXTS", "--bytes", "0"], "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, folder: str, texts: Path, capsys
) -> None:
    places = {"MODEL": folder, "TEXTS": str(texts)}
    assert run(["specialize", *(places.get(a, a) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
