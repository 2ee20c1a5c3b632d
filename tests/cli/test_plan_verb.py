"""The verb: 80 columns for people, JSON for machines."""

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from moescope.catalog import catalog
from moescope.cli.main import run
from moescope.families import save_config
from moescope.lab.plan import Plan


@pytest.mark.parametrize("arguments", [[], *([name] for name in catalog())])
def test_no_line_is_wider_than_80_columns(arguments: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80


def test_all_published_models_are_listed_in_full(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert set(catalog()) <= set(rows)
    assert rows["deepseek-v3"] == ["671.03B", "37.55B", "5.6%", "377.45", "GB", "70.27", "KB"]


def test_a_plan_shows_parameters_memory_and_work(capsys) -> None:
    assert run(["plan", "deepseek-v3"]) == 0
    shown = capsys.readouterr().out
    told = ("671.03B", "37.55B", "36.63B", "8 of 256 experts and 1 shared", "1.34 TB", "70.27 KB")
    assert all(number in shown for number in told)


def test_a_dense_plan_speaks_of_no_experts(capsys) -> None:
    assert run(["plan", "deepseek-r1-distill-llama-8b"]) == 0
    shown = capsys.readouterr().out
    assert ", no experts" in shown
    assert "routed" not in shown


def test_machines_read_one_object_or_a_list(capsys) -> None:
    assert run(["plan", "deepseek-v2", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert run(["plan", "--json"]) == 0
    every = {made["name"]: made for made in json.loads(capsys.readouterr().out)}
    assert list(every) == list(catalog())
    assert every["deepseek-v2"]["parameters"] == one["parameters"]


def test_brackets_in_a_name_are_no_markup_and_a_path_is_told_once(tmp_path, capsys) -> None:
    folder = tmp_path / "[bold]"
    folder.mkdir()
    save_config(catalog()["deepseek-v2-lite"].config, folder / "config.json")
    assert run(["plan", str(folder)]) == 0
    assert capsys.readouterr().out.replace("\n", "").count("[bold]") == 1


def test_an_unknown_model_is_one_sentence_and_exit_code_two(capsys) -> None:
    assert run(["plan", "deepsek-v3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moescope: there is no model 'deepsek-v3'; did you mean")
    assert captured.err.count("\n") == 1


@pytest.fixture
def small(tmp_path: Path) -> Path:
    fields = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_speed_is_predicted_drawn_and_kept(small: Path, tmp_path: Path, capsys) -> None:
    files = [tmp_path / name for name in ("roof.svg", "roof.png", "plan.json")]
    options = ["--svg", str(files[0]), "--png", str(files[1]), "--save", str(files[2])]
    assert run(["plan", str(small), "--prompt", "8", *options]) == 0
    shown = capsys.readouterr().out
    assert "with 8 tokens before" in shown
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80
    plan = Plan.from_file(files[2])
    assert plan.speed is not None
    assert plan.speed.prompt == 8
    assert plan.command.startswith("moescope ")
    drawing = files[0].read_text(encoding="utf-8")
    assert "operations for each byte" in drawing
    assert f"{plan.speed.read_bandwidth / 1e9:.1f} GB/s" in drawing
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_unasked(small: Path, capsys) -> None:
    assert run(["plan", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"] is None


def test_a_speed_belongs_to_a_model(capsys) -> None:
    assert run(["plan", "--speed"]) == 2
    assert "name the model" in capsys.readouterr().err


def test_placements_are_shown_and_told(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = ["plan", "deepseek-v3", "--gpus", "8,64,2048", "--tokens", "14.8"]
    assert run(line) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(cell_len, shown.splitlines())) <= 80
    assert "training on 14.8T tokens, on H800" in shown and "32 x 64" in shown
    assert run([*line, "--json"]) == 0
    dealt = json.loads(capsys.readouterr().out)["placements"]
    assert {one["gpus"] for one in dealt} == {8, 64, 2048}
    fits = [(one["data"], one["expert"]) for one in dealt if one["fits"]]
    assert (32, 64) in fits and not any(one["fits"] for one in dealt if one["gpus"] < 2048)
    # DeepSeek took 2.664M H800 hours: more than the products at the GPU's full rate.
    assert all(1.0e6 < one["product_hours"] < 2.664e6 for one in dealt)


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [
        ("many", "--gpus many says no numbers of GPUs"),
        ("12", "12 GPUs fill no whole number of nodes of 8"),
        ("0", "0 GPUs fill no whole number"),
    ],
)
def test_a_number_of_gpus_that_cannot_be_is_one_sentence(gpus: str, sentence: str, capsys) -> None:
    assert run(["plan", "deepseek-v3", "--gpus", gpus]) == 2
    assert sentence in capsys.readouterr().err
