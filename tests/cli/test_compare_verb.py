"""The verb: tables of 80 columns for people, JSON for machines."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from moescope.api import Model
from moescope.cli.main import run
from moescope.lab.compare import Comparison


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


def test_two_models_side_by_side(
    model: Model, folder: str, texts: Path, tmp_path: Path, capsys
) -> None:
    model.save(tmp_path / "again")
    file = tmp_path / "found.json"
    options = ["--text", str(texts), "--rounds", "1", "--save", str(file)]
    assert run(["compare", folder, str(tmp_path / "again"), *options]) == 0
    shown = capsys.readouterr().out
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert f"again against {Path(folder).name}" in shown
    assert "+0.0000 [+0.0000, +0.0000]  not certain" in shown
    found = Comparison.from_file(file)
    assert found.command.startswith("moescope ")
    assert found.documents == {"english": 2, "poems": 2}
    assert run(["compare", folder, str(tmp_path / "again"), *options, "--json"]) == 0
    assert Comparison.from_json(capsys.readouterr().out).results[0].name == folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["MODEL", "--text", "TEXTS"], "give two models or more"),
        (["MODEL", "MODEL", "--text", "TEXTS"], "is named twice"),
        (["MODEL", "nowhere", "--text", "TEXTS"], "there is no model 'nowhere'"),
        (["MODEL", "MODEL"], "missing option '--text'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, folder: str, texts: Path, capsys
) -> None:
    places = {"MODEL": folder, "TEXTS": str(texts)}
    assert run(["compare", *(places.get(a, a) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
