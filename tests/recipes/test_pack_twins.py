"""The study of twins: packed from real trainings, and refused where it was not matched."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from small_recipes import EXPERTS, MODEL, write_text

from moescope.cli.main import run
from moescope.errors import UserError
from moescope.scope.twin_study import RUNS, TwinStudy

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "twins"))
import pack

REST = """
[data]
sequence_length = 16
[training]
steps = {steps}
batch_size = 4
[evaluation]
tokens = 400
[checkpoints]
every = 0
"""
RECIPES = {
    "mixture": MODEL.format(width=32) + EXPERTS,
    "active": MODEL.format(width=24),
    "total": MODEL.format(width=48),
}
STEPS = {"mixture": 4, "active": 4, "total": 4, "active-time": 8, "total-time": 2}
QUIET = {"mixture": 0.5, "active": 0.25, "total": 1.0}
"""Seconds a step."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five trainings, and the times of their steps on a quiet machine."""
    home = tmp_path_factory.mktemp("twins")
    text = write_text(home / "text", held_out=50)
    runs = home / "runs"
    for name in RUNS:
        recipe = RECIPES[name.removesuffix("-time")] + REST.format(steps=STEPS[name])
        (home / f"{name}.toml").write_text(recipe)
        where = ["--data", str(text), "--out", str(runs / name)]
        assert run(["train", str(home / f"{name}.toml"), *where]) == 0
    for name, seconds in QUIET.items():
        rows = [{"step": n, "seconds": 9.0 if n == 1 else seconds} for n in range(1, 5)]
        (runs / f"quiet-{name}").mkdir()
        (runs / f"quiet-{name}/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def test_the_runs_are_packed_with_what_they_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pack.py", str(trained), str(tmp_path / "twins.json")])
    pack.main()
    study = TwinStudy.from_file(tmp_path / "twins.json")
    assert [one.name for one in study.runs] == list(RUNS)
    ours = study.runs[0]
    for one in study.runs:
        summary = json.loads((trained / one.name / "training.json").read_text())
        assert one.tokens == summary["tokens"] == STEPS[one.name] * 4 * 16
        assert one.seconds == STEPS[one.name] * QUIET[one.name.removesuffix("-time")]
        assert one.held_out == pytest.approx(summary["held_out_loss"], rel=1e-3)
        assert (one.active < one.parameters) == (one.name == "mixture")
        if one.lead is not None:
            apart = [one.held_out[domain] - ours.held_out[domain] for domain in ours.held_out]
            assert one.lead.value == pytest.approx(sum(apart) / 2, abs=2e-3)
            assert one.lead.low < one.lead.value < one.lead.high


def test_a_lead_is_as_certain_as_its_windows_agree() -> None:
    mixture = {"a": pack.np.array([1.0, 2.0, 3.0]), "b": pack.np.array([2.0, 2.0])}
    twin = {"a": pack.np.array([1.5, 2.5, 3.5]), "b": pack.np.array([2.0, 2.2])}
    lead = pack.lead(mixture, twin)
    error = math.sqrt(0.02 / 2) / 2  # nothing in a; b's two windows differ by 0.2
    assert lead.value == pytest.approx(0.3)
    assert lead.high - lead.value == pytest.approx(1.96 * error, rel=1e-3)


def test_without_the_trainings_at_equal_time_the_others_stand_alone(runs: Path) -> None:
    for name in ("active-time", "total-time"):
        shutil.rmtree(runs / name)
    assert [one.name for one in pack.pack(runs).runs] == ["mixture", "active", "total"]


def test_what_was_not_matched_is_refused(runs: Path) -> None:
    quiet = runs / "quiet-total/metrics.jsonl"
    quiet.write_text(quiet.read_text().replace("1.0", "1.1"))
    with pytest.raises(UserError, match=r"total-time takes 2 s .* another number of steps"):
        pack.pack(runs)
    quiet.unlink()
    with pytest.raises(UserError, match="cannot read how long a step takes"):
        pack.pack(runs)
    file = runs / "active/training.json"
    told = json.loads(file.read_text())
    told["tokens"] += 1
    file.write_text(json.dumps(told))
    quiet.write_text('{"seconds": 9}\n{"seconds": 1.0}')
    with pytest.raises(UserError, match="active read 257 tokens, mixture 256"):
        pack.pack(runs)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*training\.json"):
        pack.pack(runs)


def test_a_loss_that_its_model_does_not_have_is_refused(runs: Path) -> None:
    file = runs / "total/training.json"
    told = json.loads(file.read_text())
    told["held_out_loss"]["poems"] += 0.1
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"poems .* another model or another text"):
        pack.pack(runs)
