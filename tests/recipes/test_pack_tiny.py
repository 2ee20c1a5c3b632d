"""The model in the box: packed from real trainings, sitting after sitting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipes import EXPERTS, MODEL, write_text

from moescope.checkpoint import load_model
from moescope.cli.main import run
from moescope.scope.history import History
from moescope.scope.specialization import Specialization

PACK = Path(__file__).parents[2] / "recipes" / "tiny" / "pack.py"
RECIPE = """
[data]
sequence_length = 16
[training]
steps = 3
batch_size = 4
[evaluation]
every = 3
tokens = 400
[checkpoints]
every = 0
"""


def packed(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PACK, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"), held_out=50)


def test_a_second_sitting_goes_on_from_the_first(corpus: Path, tmp_path: Path) -> None:
    recipe, box = tmp_path / "moe.toml", tmp_path / "box"
    box.mkdir()
    recipe.write_text(MODEL.format(width=32) + EXPERTS + RECIPE)
    train = ["train", str(recipe), "--data", str(corpus)]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run([*train, "--out", str(first)]) == 0
    done = packed(first, corpus, "--box", box)
    assert done.returncode == 0, done.stderr
    summary = json.loads((first / "training.json").read_text())
    history = History.from_file(box / "training_history.json")
    assert history.steps == 3
    assert history.rows[-1].held_out == pytest.approx(summary["held_out_loss"], rel=1e-3)
    # Other windows than the training's own, and rounded weights.
    assert history.held_out == pytest.approx(summary["held_out_loss"], rel=0.02)
    assert Specialization.from_file(box / "specialization.json").domains == ["poems", "sums"]
    assert load_model(box).config.n_routed_experts == 4

    assert run([*train, "--out", str(second), "--start-from", str(box)]) == 0
    done = packed(second, corpus, "--box", box)
    assert done.returncode == 0, done.stderr
    history = History.from_file(box / "training_history.json")
    assert [row.step for row in history.rows] == [1, 2, 3, 4, 5, 6]
    assert (history.steps, history.sittings) == (6, [3])
    reading = json.loads((box / "reading.json").read_text())
    assert reading["tokens"] == 6 * 4 * 16

    # What learned to answer afterwards is packed in its place, with the same history.
    chats, tuned = tmp_path / "chats.jsonl", tmp_path / "tuned"
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    chats.write_text(f"{json.dumps({'messages': messages})}\n" * 8)
    sft = tmp_path / "sft.toml"
    sft.write_text('kind = "sft"\n' + RECIPE)
    went_on = ["--start-from", str(second), "--out", str(tuned)]
    assert run(["train", str(sft), "--data", str(chats), *went_on]) == 0
    done = packed(tuned, corpus, "--pretrained", second, "--box", box)
    assert done.returncode == 0, done.stderr
    assert History.from_file(box / "training_history.json").rows == history.rows
    assert json.loads((box / "reading.json").read_text()) == reading

    wrong = packed(first, corpus, "--pretrained", second, "--box", tmp_path / "nowhere")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    third = tmp_path / "third"
    recipe.write_text(
        recipe.read_text().replace("steps = 3", "steps = 3\nmuon_learning_rate = 0.05")
    )
    assert run([*train, "--out", str(third), "--start-from", str(first)]) == 0
    apart = packed(third, corpus, "--box", box)
    assert apart.returncode == 1 and "pack each sitting, in order" in apart.stderr
