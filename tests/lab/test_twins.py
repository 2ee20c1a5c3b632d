"""Recipes that are trained to be compared: the twin's size, the same tokens, and going on."""

from pathlib import Path

import pytest
from small_recipes import EXPERTS, MODEL, write_text

from moescope.catalog import catalog
from moescope.cli.main import run
from moescope.errors import UserError
from moescope.lab import trainings
from moescope.lab.compare import Comparison
from moescope.lab.routers import BASE, base_config
from moescope.lab.twins import dense_twin, is_recipe, recipe, train_recipes
from moescope.model.costs import count_parameters
from moescope.training import trainer

REST = """
[data]
sequence_length = 16
[training]
steps = 3
batch_size = 4
[evaluation]
tokens = 200
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text", held_out=20)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two small recipes, trained in this very process."""
    (tmp_path / "mixture.toml").write_text(MODEL.format(width=32) + EXPERTS + REST)
    (tmp_path / "plain.toml").write_text(MODEL.format(width=32) + REST)
    monkeypatch.setattr(trainer, "measure_gemm_peak", lambda dtype: 1e9)
    monkeypatch.setattr(trainings.torch, "set_num_threads", lambda _: None)

    def here(run, waiting, workers, look) -> None:
        for training in waiting:
            assert run(training)
            look()

    monkeypatch.setattr("moescope.lab.twins.run_all", here)
    return [str(tmp_path / "mixture.toml"), str(tmp_path / "plain.toml")]


def test_as_many_weights_work_in_the_dense_twin() -> None:
    shapes = [base_config(BASE, {}).model]
    shapes += [catalog()[name].config for name in ("tiny", "deepseek-v2-lite", "deepseek-v3")]
    for shape in shapes:
        twin = dense_twin(shape)
        active = count_parameters(shape).active_without_embedding
        rounding = 4 * 3 * shape.hidden_size * shape.num_hidden_layers
        assert abs(count_parameters(twin).total - count_parameters(twin).embedding - active) <= (
            rounding
        )
        assert not any(twin.is_moe_layer(i) for i in range(twin.num_hidden_layers))


def test_the_built_in_recipes_are_twins() -> None:
    moe, dense = recipe("moe", {}), recipe("dense", {})
    assert dense.model == dense_twin(moe.model)
    assert dense.training == moe.training
    assert is_recipe("moe")
    assert is_recipe("my.toml")
    assert not is_recipe("tiny")


def test_recipes_are_trained_compared_and_not_trained_again(
    recipes: list[str], text: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    options = ["--data", str(text), "--out", str(tmp_path / "out"), "--seeds", "2"]
    options += ["--rounds", "1", "--save", str(file)]
    assert run(["compare", *recipes, *options]) == 0
    shown = capsys.readouterr().out
    assert "plain against mixture" in shown
    assert "over seeds" in shown
    found = Comparison.from_file(file)
    assert [result.name for result in found.results] == ["mixture", "plain"]
    assert all(len(result.bits_of_seeds) == 2 for result in found.results)
    first, second = found.results[0].bits_of_seeds
    assert first != second
    monkeypatch.setattr(
        "moescope.lab.twins.train_one", lambda training: pytest.fail("trained again")
    )
    assert run(["compare", *recipes, *options]) == 0
    again = Comparison.from_file(file)
    assert again.results[0].bits_of_seeds == found.results[0].bits_of_seeds


def test_another_length_of_training_is_refused(
    recipes: list[str], text: Path, tmp_path: Path
) -> None:
    def train(steps: int, names: list[str]) -> None:
        overrides = {"data": {"source": text}, "training": {"steps": steps}}
        train_recipes(
            names, overrides, tmp_path / "out", seeds=1, workers=1, progress=lambda *_: None
        )

    train(2, recipes[:1])
    with pytest.raises(UserError, match="another config"):
        train(3, recipes[:1])
    other = tmp_path / "longer.toml"
    other.write_text((MODEL.format(width=32) + REST).replace("batch_size = 4", "batch_size = 8"))
    with pytest.raises(UserError, match="longer has batch_size 8, mixture has 4"):
        train(2, [recipes[0], str(other)])
    with pytest.raises(UserError, match="same name"):
        train(2, [recipes[0], recipes[0]])


def test_a_recipe_needs_text_and_a_place(recipes: list[str], capsys) -> None:
    assert run(["compare", *recipes]) == 2
    told = capsys.readouterr().err
    assert "is a recipe; give --data" in told
    assert told.count("\n") == 1
