"""The verb: 80 columns for people, JSON for machines."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from moescope.cli.main import run
from moescope.scope.ablation import Ablation


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("texts")
    for domain, text in (
        ("poems", "床前明月光，疑是地上霜。"),
        ("english", "the moon, is it frost?"),
    ):
        (folder / domain).mkdir()
        for name in "ab":
            (folder / domain / f"{name}.txt").write_text(f"{text} {name}", encoding="utf-8")
    return folder


def test_a_map_and_the_most_missed_experts(folder: str, texts: Path, capsys) -> None:
    assert run(["ablate", folder, str(texts)]) == 0
    shown = capsys.readouterr().out
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "each of 16 experts" in shown
    assert shown.count("\npoems") == shown.count("\nenglish") == 3  # two layers, the most missed
    assert "expert" in shown.splitlines()[-1]


def test_labels_are_chinese_where_a_domains_name_is(folder: str, texts: Path, capsys) -> None:
    (texts / "诗").mkdir(exist_ok=True)
    for name in "ab":
        (texts / "诗" / f"{name}.txt").write_text(f"低头思故乡 {name}", encoding="utf-8")
    assert run(["ablate", folder, str(texts), "--layer", "1", "--force"]) == 0
    shown = capsys.readouterr().out
    assert "强制所有词元" in shown
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_json_is_printed_and_saved(folder: str, texts: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "found.json"
    options = ["--layer", "2", "--bytes", "60", "--save", str(file), "--json"]
    assert run(["ablate", folder, str(texts), *options]) == 0
    printed = Ablation.from_json(capsys.readouterr().out)
    assert printed == Ablation.from_file(file)
    assert printed.layers == [2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "0"], "layer 0 has no routed experts"),
        (["--layer", "x"], "'--layer'"),
        (["--bytes", "5"], "has a single passage"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, folder: str, texts: Path, capsys
) -> None:
    assert run(["ablate", folder, str(texts), *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
