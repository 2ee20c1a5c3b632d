"""Trainings against themselves after a kill, against `transformers`, and against plain loops."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from small import MAIN, rows, start, write_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope.checkpoint import load_model
from moescope.cli import main as cli
from moescope.errors import UserError
from moescope.model.recorder import Recorder
from moescope.model.routing import ROUTERS, Routing
from moescope.scope.history import history_of
from moescope.scope.texts import labelled_text
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training import objective, pretraining, rescue, state
from moescope.training import trainer as trainer_module
from moescope.training.config import TrainConfig
from moescope.training.data import ShardIndex
from moescope.training.kinds import make_kind
from moescope.training.metrics import MetricsLog
from moescope.training.objective import BalanceRecorder, compute_losses
from moescope.training.state import saved_steps
from moescope.training.text import with_special_ids
from moescope.training.trainer import Trainer, train
from moescope.training.watch import Watch

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.toml"
ROUTER_FIELDS = {
    "relu": {"num_experts_per_tok": 1},  # at the start half of four experts fire
    "group_limited_greedy": {"n_group": 2, "topk_group": 1},
    "noaux_tc": {"n_group": 2, "topk_group": 2},
}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each training in this process the second that measuring the machine takes."""
    monkeypatch.setattr("moescope.training.trainer.measure_gemm_peak", lambda _: 1e11)


@pytest.fixture
def config(tmp_path: Path, corpus: Path, vocabulary: Path):
    """Return a function that makes a config of the small training with some fields changed."""

    def make(**changes: dict[str, Any]) -> TrainConfig:
        path = write_config(tmp_path / "config.toml", **changes)
        data = {"source": corpus, "tokenizer": vocabulary}
        return TrainConfig.from_file(path, {"data": data})

    return make


@pytest.fixture
def trainer(tmp_path: Path, config):
    """Return a function that makes a trainer of the small training with some fields changed."""

    def make(out: str = "out", **changes: dict[str, Any]) -> Trainer:
        made = config(**changes)
        kind = make_kind(made, tmp_path / out, lambda _: None)
        model = with_special_ids(made.model, kind.tokenizer)
        return Trainer(made.model_copy(update={"model": model}), tmp_path / out, kind)

    return make


def run(config: TrainConfig, out: Path, resume: bool = False, threads: int = 1) -> str:
    """Train in this process; return what was said."""
    stream = io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train(config, out, resume=resume, stream=stream)
    finally:
        torch.set_num_threads(before)
    return stream.getvalue()


def assert_same_training(out: Path, other: Path) -> None:
    assert rows(out) == rows(other)
    measured = ("expert_load.json", "expert_load.jsonl")
    for name in ("model.safetensors", "config.json", "tokenizer.json", *measured):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name


# --- ended and continued -------------------------------------------------------------------------

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


# --- what is logged ------------------------------------------------------------------------------


def test_loads_and_repetitions_are_logged_and_kept_in_the_history(config, tmp_path: Path) -> None:
    said = run(config(training={"steps": 20}), tmp_path)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if "load" in row] == [10, 20]
    for layer in ("1", "2"):
        assert sum(logged[9]["load"][layer]) == pytest.approx(1, abs=1e-5)
        assert logged[9]["experts_per_token"][layer] == pytest.approx(2)
        busiest = max(logged[9]["load"][layer]) * 4 - 1
        assert logged[9]["max_violation"][layer] == pytest.approx(busiest, abs=1e-4)
    history = history_of(tmp_path)
    assert [row.step for row in history.rows if row.load] == [10, 20]
    assert history.rows[3].experts_per_token == {"1": 2.0, "2": 2.0}
    summary = json.loads((tmp_path / "training.json").read_text())
    read = 20 * 4 * 24
    index = json.loads((tmp_path / "shards" / "train" / "index.json").read_text())
    tokens = {shard["domain"]: shard["tokens"] for shard in index["shards"]}
    assert sum(summary["epochs"][d] * n for d, n in tokens.items()) == pytest.approx(read)
    assert f"read: poetry {summary['epochs']['poetry']:.2g} times" in said
    assert "20 steps read poetry" in said


@pytest.mark.parametrize("topk_method", ["expert_choice", "sinkhorn"])
def test_where_tokens_compete_within_a_micro_batch_it_is_said(
    topk_method: str, config, tmp_path: Path
) -> None:
    model = {"topk_method": topk_method, "scoring_func": "softmax"}
    said = run(config(model=model, training={"steps": 1}), tmp_path)
    assert f"{topk_method}: the 48 tokens of a micro batch compete for experts" in said
    assert "micro_batch_size 2 is part of this recipe" in said


def test_expert_choice_learns_thresholds_that_keep_its_number_of_experts(
    config, tmp_path: Path
) -> None:
    model = {"topk_method": "expert_choice", "scoring_func": "softmax", "n_routed_experts": 8}
    training = {"steps": 40, "batch_size": 16, "micro_batch_size": 16, "dtype": "float32"}
    run(config(model=model, training=training, balance={"sequence_aux": 0.0}), tmp_path)
    network = load_model(tmp_path)
    ids = torch.tensor([Tokenizer.load(tmp_path).encode("There were 7 books upon the shelf.")])
    kept = Kept()
    with torch.no_grad():
        whole = network.logits(network(ids, recorder=kept))
        alone = network.logits(network(ids[:, :5]))
    torch.testing.assert_close(whole[:, :5], alone, atol=1e-5, rtol=1e-4)
    assert 1 < float((kept.routings[1].topk_ids >= 0).sum()) / ids.shape[1] < 4


# --- what comes out ------------------------------------------------------------------------------


def test_the_smoke_recipe_learns(corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_file(
        SMOKE, {"data": {"source": corpus}, "model": {"vocab_size": 300}}
    )
    run(config, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert max(losses[-5:]) < losses[0] - 1
    first, last = [row["held_out_loss"] for row in rows(tmp_path) if "held_out_loss" in row]
    assert set(first) == {"prose", "poetry", "sums"}
    assert all(last[domain] < first[domain] < math.log(300) for domain in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, vocabulary: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder / "config.toml", training={"steps": 20, "dtype": "float32"})
    data = {"source": corpus, "tokenizer": vocabulary}
    run(TrainConfig.from_file(path, {"data": data}), folder / "out")
    return folder / "out"


def test_transformers_opens_the_result_and_sees_the_same(finished: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    ours = load_model(finished)
    text = "There were 7 books upon the shelf. 床前明月光 3 + 4"
    ids = AutoTokenizer.from_pretrained(finished)(text, return_tensors="pt").input_ids
    assert ids[0].tolist()[-20:] == Tokenizer.load(finished).encode(text)[-20:]
    with torch.no_grad():
        logits = ours.logits(ours(ids))
        assert logits.std() > 0.5
        torch.testing.assert_close(logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)


def test_evaluation_is_a_float64_loop_of_transformers(finished: Path, corpus: Path) -> None:
    """Each held-out token but the first is predicted once, in rows of 24, up to 200."""
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float64)
    model.set_experts_implementation("eager")
    tokenizer = Tokenizer.load(finished)
    load = {1: torch.zeros(4, dtype=torch.int64)}

    def count(_module: object, inputs: tuple[Tensor, ...]) -> None:
        load[1] += torch.bincount(inputs[1].flatten(), minlength=4)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(count)
    summary = json.loads((finished / "training.json").read_text())
    shown = json.loads((finished / "expert_load.json").read_text())["load"]
    series = (finished / "expert_load.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in series] == [20]
    assert json.loads(series[-1])["load"] == shown
    total = torch.zeros(4)
    for domain in ("prose", "poetry", "sums"):
        lines = (corpus / "held_out" / domain / "a.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        ids = [i for text in texts for i in [0, *tokenizer.encode(text), 1]]
        length = min(200, len(ids) - 1) // 24 * 24
        assert length > 48
        nats = 0.0
        with torch.no_grad():
            for start_of_row in range(0, length, 24):
                row = ids[start_of_row : start_of_row + 25]
                log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
                nats -= sum(float(log_probs[i, token]) for i, token in enumerate(row[1:]))
        text_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids[1 : length + 1] if i > 2)
        assert summary["held_out_loss"][domain] == pytest.approx(nats / length, rel=1e-5)
        bits = nats / math.log(2) / text_bytes
        assert summary["bits_per_byte"][domain] == pytest.approx(bits, rel=1e-5)
        assert shown[domain] == {"1": load[1].tolist()}
        total += load[1]
        load[1].zero_()
    router = summary["router"]["1"]
    assert router["max_violation"] == pytest.approx(float(total.max() / total.mean() - 1))
    assert router["dead_share"] == float((total == 0).double().mean())


def test_the_model_is_judged_on_what_its_trainer_held_out(
    config, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder without `train/` and `held_out/` only hashes tell them apart."""
    made = config(training={"steps": 1})
    data = made.data.model_copy(update={"source": corpus / "train"})
    made = made.model_copy(update={"data": data})
    run(made, tmp_path / "out")
    index = ShardIndex(
        tmp_path / "out" / "shards" / "train",
        json.loads((tmp_path / "out" / "shards" / "train" / "index.json").read_text()),
    )
    tokenizer = Tokenizer.load(tmp_path / "out")
    seen = {
        tokenizer.decode(index.document(domain_id, number).tolist())
        for domain_id, shard in enumerate(index.shards)
        for number in range(shard.documents)
    }
    assert len(seen) > 100
    text = labelled_text(corpus / "train", trained=[TrainedText.load(tmp_path / "out")])
    assert text.held_out == {"poetry": True, "prose": True, "sums": True}
    assert {document.text for document in text.documents}.isdisjoint(seen)
    line = ["specialize", str(tmp_path / "out"), "--json"]
    assert cli.run([*line, str(corpus / "train")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["held_out"] == text.held_out
    assert "nothing tells" not in captured.err
    assert cli.run([*line, str(corpus / "held_out")]) == 0
    captured = capsys.readouterr()
    assert not any(json.loads(captured.out)["held_out"].values())
    told = "nothing tells whether this text of poetry, prose, sums was trained on"
    assert told in captured.err


def test_the_model_remembers_the_length_of_its_rows(finished: Path) -> None:
    config = load_model(finished).config
    assert (config.trained_length, config.max_position_embeddings) == (24, 64)


@pytest.mark.parametrize("topk_method", list(ROUTERS))
def test_every_router_trains(topk_method: str, config, tmp_path: Path) -> None:
    model = {"topk_method": topk_method, **ROUTER_FIELDS.get(topk_method, {})}
    run(config(model=model, training={"steps": 2, "dtype": "float32"}), tmp_path)
    first, second = rows(tmp_path)
    assert first["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert second["loss"] < first["loss"]
    assert load_model(tmp_path).config.topk_method == topk_method
    if topk_method != "noaux_tc":
        with pytest.raises(ValueError, match="model type `moescope`"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    if topk_method == "relu":
        assert second["l1_weight"] / first["l1_weight"] == pytest.approx(1.2)


# --- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk_method", ["noaux_tc", "greedy", "relu"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradients_of_micro_batches_sum_to_those_of_the_batch(
    optimizer: str, topk_method: str, trainer
) -> None:
    """After one step momenta and first moments are the clipped gradient times a constant.

    Losses that weigh a whole batch's load are among them.
    """
    balance = {"z_loss": 0.1, "expert_aux": 1.0, "device_aux": 1.0, "device_groups": 2}
    if topk_method == "relu":
        balance = {"l1_start": 1.0, "sequence_aux": 0.0}
    ends: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    for rows_at_a_time in (1, 2, 4):
        training = {"dtype": "float32", "optimizer": optimizer, "micro_batch_size": rows_at_a_time}
        model = {"topk_method": topk_method, **ROUTER_FIELDS.get(topk_method, {})}
        made = trainer(training=training, balance=balance, model=model)
        row = made.train_step()
        ends.append((row, made.learner.optimizer.state_tensors()))
    for other_row, other_state in ends[:2]:
        assert_same_step(ends[2], (other_row, other_state))


def assert_same_step(one: tuple[dict[str, Any], dict[str, Tensor]], other: Any) -> None:
    (row, state), (other_row, other_state) = one, other
    for name in ("loss", "further_tokens_loss", "balance_loss", "gradient_norm"):
        assert row[name] == pytest.approx(other_row[name], rel=1e-5) and row[name] > 0
    assert row["max_violation"] == other_row["max_violation"]
    gradients = [n for n in state if n.startswith(("momentum.", "adamw.exp_avg."))]
    assert len(gradients) == len([n for n in state if n.startswith("master.")])
    for name in gradients:
        torch.testing.assert_close(state[name], other_state[name], atol=1e-7, rtol=1e-4, msg=name)


class Kept(Recorder):
    def __init__(self) -> None:
        self.routings: dict[int, Routing] = {}

    def routing(self, layer_idx: int, routing: Routing) -> None:
        self.routings[layer_idx] = routing


def next_ids(trainer: Trainer) -> Tensor:
    """Return the ids that the trainer's first step will see."""
    kind = make_kind(trainer.config, trainer.out, lambda _: None)
    (parts,) = kind.updates(trainer.model, 0)
    return torch.cat([part.ids for part in parts])


def test_the_bias_moves_against_the_load_of_the_step(trainer) -> None:
    made = trainer(training={"dtype": "float32"})
    kept = Kept()
    with torch.no_grad():
        made.model(next_ids(made)[:, :-1], recorder=kept)
    row = made.train_step()
    chosen = [kept.routings[1].topk_ids.flatten().tolist().count(i) for i in range(4)]
    mean = sum(chosen) / 4
    expected = [0.01 * ((mean > count) - (mean < count)) for count in chosen]
    bias = made.model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.tolist() == pytest.approx(expected) and any(expected)
    assert row["experts_per_token"]["1"] == pytest.approx(sum(chosen) / (4 * 24))
    assert row["max_violation"]["1"] == pytest.approx(max(chosen) / mean - 1)


def shares(scores: Tensor) -> Tensor:
    """Scores that sum to one for each token, as the formulas' softmax scores do."""
    return scores.detach().double() / scores.detach().double().sum(dim=1, keepdim=True)


def expert_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeekMoE, eq. 12-14, over all tokens as one sequence."""
    tokens, experts = scores.shape
    counts = [topk_ids.flatten().tolist().count(i) for i in range(experts)]
    columns = shares(scores).T.tolist()
    k = topk_ids.shape[1]
    return sum(
        experts / (k * tokens) * count * sum(column) / tokens
        for count, column in zip(counts, columns, strict=True)
    )


def sequence_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeek-V3, eq. 17-20: scores normalised for each token, one term a sequence."""
    sequences = zip(scores.split(24), topk_ids.split(24), strict=True)
    terms = [expert_aux(part, ids) for part, ids in sequences]
    return sum(terms) / len(terms)


def device_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeekMoE, eq. 15-17, with two devices of two experts."""
    tokens, experts = scores.shape
    k, loss = topk_ids.shape[1], 0.0
    for device in ([0, 1], [2, 3]):
        counts = [topk_ids.flatten().tolist().count(i) for i in device]
        load = sum(experts / (k * tokens) * count for count in counts) / len(device)
        loss += load * sum(float(shares(scores)[:, i].sum()) / tokens for i in device)
    return loss


def z_loss(logits: Tensor) -> float:
    """ST-MoE, eq. 5."""
    sums = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.double().tolist()]
    return sum(sums) / len(sums)


def l1(scores: Tensor, topk_ids: Tensor) -> float:
    """ReMoE: outputs of busy experts weigh more."""
    tokens, experts = scores.shape
    counts = [topk_ids.flatten().tolist().count(i) for i in range(experts)]
    return sum(
        experts / (2 * tokens) * count * float(scores[:, i].detach().double().sum()) / tokens
        for i, count in enumerate(counts)
    )


@pytest.mark.parametrize(
    ("balance", "model", "term"),
    [
        ({"expert_aux": 0.1}, {}, lambda r: 0.1 * expert_aux(r.scores, r.topk_ids)),
        ({"sequence_aux": 0.2}, {}, lambda r: 0.2 * sequence_aux(r.scores, r.topk_ids)),
        (
            {"device_aux": 0.3, "device_groups": 2},
            {},
            lambda r: 0.3 * device_aux(r.scores, r.topk_ids),
        ),
        ({"z_loss": 0.4}, {}, lambda r: 0.4 * z_loss(r.router_logits)),
        (
            {"l1_start": 0.5},
            {"topk_method": "relu"},
            lambda r: 0.5 / 2 * l1(r.scores, r.topk_ids),
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_a_balance_term_is_its_formula_summed_over_layers(
    balance: dict[str, float], model: dict[str, str], term, trainer
) -> None:
    made = trainer(
        model={"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, **model},
        balance={"sequence_aux": 0.0, **balance},
        training={"dtype": "float32"},
    )
    ids, kept = next_ids(made), Kept()
    config = made.config
    recorder = BalanceRecorder(
        config.model, config.balance, rows=len(ids), l1_weight=made.learner.l1.weight
    )
    losses = compute_losses(made.model, ids, recorder, 0.3)
    made.model(ids[:, :-1], recorder=kept)
    assert list(kept.routings) == [0, 1]
    expected = sum(term(routing) for routing in kept.routings.values())
    assert float(losses.balance.detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3
    whole = losses.next_token + 0.3 * losses.further_tokens + losses.balance
    assert losses.total.item() == pytest.approx(whole.item())


def test_a_prediction_depths_experts_are_balanced_too(trainer) -> None:
    made = trainer(model={"num_nextn_predict_layers": 1})
    layers = made.config.model.num_hidden_layers
    gate = made.model.mtp.depths[0].layer.mlp.gate
    row = made.train_step()
    assert str(layers) in row["max_violation"]
    speed = made.config.balance.bias_update_speed
    moved = gate.e_score_correction_bias.abs().tolist()
    assert all(size == pytest.approx(speed) for size in moved if size)
    assert any(moved)


def test_further_tokens_are_predicted_by_later_depths(trainer) -> None:
    """DeepSeek-V3, eq. 21-25: depth d joins the token d ahead and predicts the one after it."""
    made = trainer(training={"dtype": "float32"}, model={"num_nextn_predict_layers": 2})
    config, network = made.config, made.model
    ids = next_ids(made)  # (4, 25)
    recorder = BalanceRecorder(config.model, config.balance, rows=len(ids), l1_weight=0.0)
    losses = compute_losses(network, ids, recorder, 0.3)
    hidden, means = network(ids[:, :-1]).detach(), []  # (4, 24, hidden)
    for ahead, depth in ((1, network.mtp.depths[0]), (2, network.mtp.depths[1])):
        hidden = hidden[:, : 24 - ahead]
        joined = ids[:, ahead:24]
        positions = torch.arange(24 - ahead).expand(4, -1)
        rotation = network.model.rotary_emb(positions, hidden.dtype)
        embedded = network.model.embed_tokens(joined)
        hidden = depth(hidden, embedded, joined, rotation, positions)
        log_probs = network.logits(depth.norm(hidden)).detach().double().log_softmax(-1)
        nats = [
            -float(log_probs[row, i, ids[row, i + ahead + 1]])
            for row in range(4)
            for i in range(24 - ahead)
        ]
        means.append(sum(nats) / len(nats))
    assert float(losses.further_tokens) == pytest.approx(sum(means) / 2, rel=1e-5)
