"""A training that starts from a model's weights."""

import json
from pathlib import Path

import pytest
import torch
from small import rows, write_config

from moescope.checkpoint import load_model
from moescope.cli import main as cli


def test_a_training_goes_on_from_a_models_weights_and_reads_other_text(
    corpus: Path, vocabulary: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "c.toml", training={"steps": 6, "dtype": "float32", "decay_fraction": 0.0}
    )
    common = ["train", str(config), "--data", str(corpus)]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run([*common, "--tokenizer", str(vocabulary), "--out", str(first)]) == 0
    assert cli.run([*common, "--start-from", str(first), "--out", str(second)]) == 0
    before, after = rows(first), rows(second)
    assert after[0]["loss"] < before[0]["loss"] - 0.1
    ends = [json.loads((folder / "training.json").read_text()) for folder in (first, second)]
    for domain, times in ends[0]["epochs"].items():  # it read on, and not anew
        assert ends[1]["epochs"][domain] > times
    readings = [json.loads((folder / "reading.json").read_text()) for folder in (first, second)]
    assert readings[1]["tokens"] == 2 * readings[0]["tokens"] == 2 * 6 * 4 * 24


def test_rates_of_nothing_leave_the_weights_as_they_were(
    corpus: Path, vocabulary: Path, tmp_path: Path
) -> None:
    tiny = {"steps": 2, "dtype": "float32", "muon_learning_rate": 1e-12}
    config = write_config(
        tmp_path / "c.toml",
        training={**tiny, "adamw_learning_rate": 1e-12, "weight_decay": 0.0},
        balance={"bias_update_speed": 0.0},
    )
    common = ["train", str(config), "--data", str(corpus)]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run([*common, "--tokenizer", str(vocabulary), "--out", str(first)]) == 0
    assert cli.run([*common, "--seed", "1", "--start-from", str(first), "--out", str(second)]) == 0
    ours, theirs = (load_model(folder).state_dict() for folder in (first, second))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"hidden_size": 40}}, "hidden_size = 40"),
        ({"model": {"num_experts_per_tok": 1}}, "num_experts_per_tok = 1"),
    ],
)
def test_another_shape_is_refused_by_name(
    corpus: Path,
    vocabulary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, dict[str, int]],
    sentence: str,
) -> None:
    config = write_config(tmp_path / "c.toml", training={"steps": 1})
    other = write_config(tmp_path / "d.toml", training={"steps": 1}, **change)
    first = tmp_path / "first"
    common = ["train", "--data", str(corpus)]
    assert cli.run([*common, str(config), "--tokenizer", str(vocabulary), "--out", str(first)]) == 0
    arguments = [*common, str(other), "--start-from", str(first), "--out", str(tmp_path / "x")]
    assert cli.run(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.toml")
    arguments = ["train", str(config), "--data", str(corpus), "--out", str(tmp_path / "x")]
    assert cli.run([*arguments, "--start-from", "nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err
