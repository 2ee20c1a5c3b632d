"""Trainings that go wrong: losses that are no numbers, rates too high, a full disk."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from small import rows, run

from moescope.checkpoint import load_model
from moescope.errors import UserError
from moescope.training import objective, pretraining, rescue, state, trainer as trainer_module
from moescope.training.config import TrainConfig
from moescope.training.metrics import MetricsLog
from moescope.training.state import saved_steps
from moescope.training.trainer import train
from moescope.training.watch import Watch

pytestmark = pytest.mark.usefixtures("unmeasured")


def test_a_loss_that_is_no_number_ends_the_training(config, tmp_path: Path) -> None:
    made = config(
        training={"dtype": "float32", "muon_learning_rate": 1e30, "adamw_learning_rate": 1e30},
        checkpoints={"every": 1},
    )
    told = r"steps 2 to 6 went wrong: .* lower muon_learning_rate \(1e\+30\) .* \(there are 1\)"
    with pytest.raises(UserError, match=told):
        run(made, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [1]
    assert not (tmp_path / "model.safetensors").exists()


def test_the_way_that_is_offered_out_of_a_failure_works(config, tmp_path: Path) -> None:
    """Back to a checkpoint from before, with lower rates."""

    def rates(muon: float, adamw: float) -> TrainConfig:
        training = {
            "dtype": "float32",
            "muon_learning_rate": muon,
            "adamw_learning_rate": adamw,
            "warmup_fraction": 0.2,
        }
        return config(training=training, checkpoints={"every": 1, "keep": 4})

    run(rates(3e-3, 3e-3), tmp_path)
    for step in (11, 12):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:06d}")
    (tmp_path / "model.safetensors").unlink()
    stream = io.StringIO()
    train(rates(1e-3, 1e-3), tmp_path, from_step=9, stream=stream)
    said = stream.getvalue()
    assert "step-000009" in said
    assert "training.muon_learning_rate was 0.003 and is 0.001 from here on" in said
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*; it has .*12"):
        train(rates(1e-3, 1e-3), tmp_path, from_step=3, stream=stream)


def test_a_batch_without_a_finite_gradient_is_skipped(
    trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(training={"dtype": "float32", "steps": 3})
    made.train_step()
    before = {name: master.clone() for name, master in made.learner.optimizer.masters.items()}
    losses = objective.compute_losses

    def broken(*arguments: Any) -> Any:
        found = losses(*arguments)
        return replace(found, main=found.main * math.nan)

    monkeypatch.setattr(pretraining, "compute_losses", broken)
    row = made.train_step()
    assert row["loss"] is None and "nan" in row["problem"]
    assert all(torch.equal(before[n], m) for n, m in made.learner.optimizer.masters.items())
    monkeypatch.setattr(pretraining, "compute_losses", losses)
    assert made.train_step()["loss"] > 0
    assert made.step == 3
    assert all(bool(master.isfinite().all()) for master in made.learner.optimizer.masters.values())
    assert not any(torch.equal(before[n], m) for n, m in made.learner.optimizer.masters.items())


def test_a_training_that_ends_worse_than_chance_says_so(config, tmp_path: Path) -> None:
    rates = {"muon_learning_rate": 1.0, "adamw_learning_rate": 1.0}
    said = run(config(training={"dtype": "float32", "steps": 20, **rates}), tmp_path)
    assert "this training failed: the loss over the last 20 steps is" in said
    assert "no better than guessing (ln of the vocabulary, 5.70)" in said
    assert "lower muon_learning_rate (1) and adamw_learning_rate (1)" in said
    assert (
        "no better than guessing" in json.loads((tmp_path / "training.json").read_text())["failed"]
    )


def test_a_failing_training_is_told_once_and_again_after_a_recovery() -> None:
    watch = Watch(vocab_size=100, warmup_steps=10)
    told = []
    losses = [4.0] * 10 + [5.0] * 250 + [1.0] * 150 + [6.0] * 150
    for step, loss in enumerate(losses, start=1):
        watch.add(step, loss)
        told += [step] if watch.news() else []
    assert told[0] == 110
    assert len(told) == 2 and 410 < told[1] < 560
    assert watch.is_failing


def test_a_type_that_this_processor_is_slow_at_is_told(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {torch.bfloat16: 1e9, torch.float32: 40e9}
    monkeypatch.setattr(trainer_module, "measure_gemm_peak", peaks.__getitem__)
    said = run(config(training={"steps": 1}), tmp_path / "slow")
    assert "multiplies float32 40 times as fast as bfloat16" in said
    peaks[torch.bfloat16] = 80e9
    assert "as fast as" not in run(config(training={"steps": 1}), tmp_path / "fast")


# --- a full disk ---------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_finished_model_lies_elsewhere_when_the_disk_is_full(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, spare = tmp_path / "out", tmp_path / "spare"
    save = trainer_module.save_weights

    def save_elsewhere(model: Any, folder: Path) -> None:
        full() if folder == out else save(model, folder)

    monkeypatch.setattr(trainer_module, "save_weights", save_elsewhere)
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(spare))
    with pytest.raises(UserError, match=r"cannot write the finished model .*; it lies in .*spare"):
        run(config(training={"steps": 2}), out)
    [folder] = spare.iterdir()
    assert load_model(folder).config.trained_length == 24
    assert (folder / "training.json").exists() and (folder / "tokenizer.json").exists()


def test_a_finished_model_waits_for_room_where_there_is_none() -> None:
    tries: list[Path] = []
    said: list[str] = []

    def save(folder: Path) -> None:
        tries.append(folder)
        if len(tries) < 7:
            full()

    rescue.save_somewhere(save, Path("out"), said.append, wait=lambda _: None)
    assert tries[0] == tries[-1] == Path("out")
    assert "tried again every 30 s" in said[0]
    with pytest.raises(UserError, match="free some space, then finish it with --resume"):
        rescue.save_somewhere(full, Path("out"), said.append, wait=lambda _: None)


def test_a_checkpoint_without_room_does_not_end_the_training(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = state.save_file
    monkeypatch.setattr(state, "save_file", full)
    said = run(config(training={"steps": 4}, checkpoints={"every": 2}), tmp_path)
    assert "step 2: cannot write the checkpoint" in said
    assert load_model(tmp_path).config.trained_length == 24
    monkeypatch.setattr(state, "save_file", saved)


def test_metrics_wait_for_room(tmp_path: Path) -> None:
    """Half a line that a full disk took is cut off again; nothing is lost, nothing twice."""
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1})
    file = log._file

    class Full:
        def write(self, data: bytes) -> int:
            file.write(data[:5])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    log._file = Full()
    assert "No space left on device" in str(log.write({"step": 2}))
    assert log.write({"step": 3}) is None
    assert rows(tmp_path) == [{"step": 1}]
    log._file = file
    log.close()
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
