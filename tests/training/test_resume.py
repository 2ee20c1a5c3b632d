"""Trainings that were killed, stopped or lengthened, against those that never were."""

import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small import MAIN, rows, run, start, write_config

from moescope.errors import UserError
from moescope.training.config import TrainConfig
from moescope.training.state import saved_steps

pytestmark = pytest.mark.usefixtures("unmeasured")


def assert_same_training(out: Path, other: Path) -> None:
    assert rows(out) == rows(other)
    measured = ("expert_load.json", "expert_load.jsonl")
    for name in ("model.safetensors", "config.json", "tokenizer.json", *measured):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name


LONG = {
    "training": {"steps": 60},
    "evaluation": {"every": 15},
    "checkpoints": {"every": 7},
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, corpus: Path, vocabulary: Path):
    path = write_config(tmp_path_factory.mktemp("config") / "config.toml", **LONG)
    return [path, "--data", corpus, "--tokenizer", vocabulary]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[Path | str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(start(*arguments, "--out", out))
    return out


def finish(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stdout


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_training_ends_as_one_never_killed(
    arguments: list[Path | str], uninterrupted: Path, tmp_path: Path
) -> None:
    for step in (17, 38):
        process = start(*arguments, "--out", tmp_path, "--resume")
        wait_for_step(process, tmp_path, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert "continuing from" in finish(start(*arguments, "--out", tmp_path, "--resume"))
    assert_same_training(tmp_path, uninterrupted)


KILLED_WHILE_SAVING = f"""
import os, signal
from moescope.training import state
save_file, saved = state.save_file, []
def save_half(tensors, path):
    save_file(tensors, path)
    saved.append(path)
    if len(saved) == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
state.save_file = save_half
{MAIN}
"""


@pytest.mark.slow
def test_a_training_killed_while_it_saves_ends_as_one_never_killed(
    arguments: list[Path | str], uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(*arguments, "--out", tmp_path, main=KILLED_WHILE_SAVING)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert saved_steps(tmp_path / "checkpoints") == [7, 14]
    finish(start(*arguments, "--out", tmp_path, "--resume"))
    assert_same_training(tmp_path, uninterrupted)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_says_where_and_loses_nothing(
    number: signal.Signals, arguments: list[Path | str], uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(*arguments, "--out", tmp_path)
    wait_for_step(process, tmp_path, 16)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "")
    step = saved_steps(tmp_path / "checkpoints")[-1]
    path = tmp_path / "checkpoints" / f"step-{step:06d}"
    assert step >= 16
    assert stdout.endswith(f"stopped at step {step}; continue with --resume from {path}\n")
    assert f"continuing from {path}\n" in finish(start(*arguments, "--out", tmp_path, "--resume"))
    assert_same_training(tmp_path, uninterrupted)


def test_a_second_interruption_ends_at_once(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler that a second Ctrl-C meets is the system's own."""
    made = trainer()
    step, handlers = made.train_step, []

    def interrupted() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        handlers.append(signal.getsignal(signal.SIGTERM))
        return step()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(made, "train_step", interrupted)
    assert made.run(Console(file=io.StringIO())) is None
    assert handlers == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGTERM) == before
    assert saved_steps(made.out / "checkpoints") == [1]


def test_added_steps_continue_from_before_the_decay(config, tmp_path: Path) -> None:
    def steps(number: int) -> TrainConfig:
        training = {"steps": number, "decay_fraction": 0.25}
        return config(training=training, checkpoints={"every": 4, "keep": 1})

    run(steps(8), tmp_path / "out")
    assert saved_steps(tmp_path / "out" / "checkpoints") == [6, 8]
    assert "step-000006" in run(steps(12), tmp_path / "out", resume=True)
    run(steps(12), tmp_path / "other")
    assert_same_training(tmp_path / "out", tmp_path / "other")


def test_steps_cannot_be_added_after_the_decay(config, tmp_path: Path) -> None:
    checkpoints = {"every": 4, "keep": 1}
    run(config(training={"steps": 8}, checkpoints=checkpoints), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
    with pytest.raises(UserError, match=r"no checkpoint in .* can continue to 9 steps"):
        run(config(training={"steps": 9}, checkpoints=checkpoints), tmp_path, resume=True)


def test_a_finished_training_can_be_finished_again(config, tmp_path: Path) -> None:
    made = config(checkpoints={"every": 4})
    run(made, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    run(made, tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_old_checkpoints_go_and_the_one_before_the_decay_stays(config, tmp_path: Path) -> None:
    run(config(training={"decay_fraction": 0.7}, checkpoints={"every": 2, "keep": 3}), tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [4, 8, 10, 12]


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        ("training", "weight_decay", 0.5),
        ("balance", "z_loss", 0.1),
        ("model", "n_routed_experts", 8),
        ("data", "sequence_length", 16),
    ],
)
def test_a_resumed_training_keeps_its_settings(
    table: str, field: str, value: float, config, tmp_path: Path
) -> None:
    def changed(**fields: float) -> TrainConfig:
        tables = {"checkpoints": {"every": 1}, "training": {"steps": 2}}
        return config(**{**tables, table: {**tables.get(table, {}), **fields}})

    run(changed(), tmp_path)
    told = rf"was made with {table}\.{field} = .*the config now says {value}; set it back"
    with pytest.raises(UserError, match=told):
        run(changed(**{field: value}), tmp_path, resume=True)


def test_another_number_of_threads_is_told(config, tmp_path: Path) -> None:
    made = config(training={"steps": 2}, checkpoints={"every": 1})
    run(made, tmp_path)
    assert "the checkpoint was made" not in run(made, tmp_path, resume=True)
    said = run(made, tmp_path, resume=True, threads=2)
    assert "was made with 1 threads, this process has 2" in said
