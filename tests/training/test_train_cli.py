"""What `moescope train` says to a user's mistakes, and to machines."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small import MAIN, rows, start, write_config
from texts import PROSE, write_jsonl

from moescope.cli import main as cli
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import FIELDS
from moescope.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.toml", training={"steps": 4}, checkpoints={"every": 2})


@pytest.fixture
def train(config: Path, corpus: Path, vocabulary: Path, tmp_path: Path, capsys):
    """Return a function that trains into `tmp_path/out` and returns exit code, stdout, stderr."""

    def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
        chosen = {"data": corpus, "tokenizer": vocabulary, "out": tmp_path / "out", **options}
        line = ["train", str(config), *arguments]
        for name, value in chosen.items():
            if value is not None:
                line += [f"--{name}", str(value)]
        code = cli.run(line)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def assert_told(result: tuple[int, str, str], *words: str) -> None:
    """The mistake is exit code 2 and one sentence on stderr that holds `words`."""
    code, _, stderr = result
    assert code == 2, stderr
    assert stderr.startswith("moescope: ")
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"step": 4}}, ["[training] has no field `step`", "did you mean `steps`?"]),
        ({"training": {"zzz": 4}}, ["[training] has no field `zzz`", "it knows", "batch_size"]),
        (
            {"model": {"n_routed_expert": 4}},
            ["[model] has no field `n_routed_expert`", "`n_routed_experts`"],
        ),
        ({"training": {"steps": "many"}}, ["`training.steps` is 'many'", "valid integer"]),
        ({"training": {"steps": 0}}, ["`training.steps` is 0", "greater than 0"]),
        ({"training": {"steps": None}}, ["`training.steps` is missing"]),
        ({"training": {"optimizer": "sgd"}}, ["`training.optimizer` is 'sgd'", "'muon'"]),
        ({"model": {"hidden_size": "wide"}}, ["[model]: `hidden_size` is 'wide'"]),
        ({"model": {"hidden_size": None}}, ["[model]: `hidden_size` is missing"]),
        ({"model": {"num_experts_per_tok": 5}}, ["num_experts_per_tok 5", "n_routed_experts 4"]),
        ({"training": {"micro_batch_size": 3}}, ["batch_size 4", "micro_batch_size 3"]),
        ({"training": {"warmup_fraction": 0.9}}, ["warmup_fraction 0.9", "decay_fraction 0.2"]),
        ({"data": {"sequence_length": 65}}, ["sequence_length 65", "max_position_embeddings 64"]),
        ({"balance": {"device_groups": 3}}, ["n_routed_experts 4", "device_groups 3"]),
        ({"model": {"bos_token_id": 7}}, ["bos_token_id is 7 in [model] but 0", "leave it out"]),
        ({"model": {"vocab_size": 299}}, ["tokenizer has 300 tokens", "vocab_size is 299"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(next(iter(value.values())))),
)
def test_a_mistake_in_the_config_is_named(
    changes: dict[str, dict[str, Any]], words: list[str], config: Path, train
) -> None:
    write_config(config, **changes)
    assert_told(train(), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model\n", ["cannot read", "config.toml as TOML", "line 1"]),
        ("a = 1\na = 2\n", ["cannot read", "config.toml as TOML"]),
        ("model = 3\n", ["`model` is 3; make it a table, [model]"]),
        ("[modell]\n", ["there is no table `modell`; did you mean `model`?"]),
        ("", ["lacks the table [model]"]),
        ("\udcff", ["cannot read", "config.toml as TOML"]),
    ],
)
def test_a_file_that_is_no_config_is_named(
    text: str, words: list[str], config: Path, train
) -> None:
    config.write_bytes(text.encode(errors="surrogateescape"))
    assert_told(train(), *words)


def test_a_missing_config_is_named(config: Path, train) -> None:
    config.unlink()
    assert_told(train(), f"there is no {config}", "name a training config")
    config.mkdir()
    assert_told(train(), f"cannot read {config}")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "many"], "invalid value for '--steps'"),
        (["--seed", "-1"], "`training.seed` is -1"),
        (["--steps", "0"], "`training.steps` is 0"),
        (["--step", "3"], "--steps"),
    ],
)
def test_a_mistake_in_an_option_is_named(arguments: list[str], word: str, train) -> None:
    assert_told(train(*arguments), word)


def test_help_leads_to_a_list_of_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "-h"]) == 0
    assert "--fields" in capsys.readouterr().out
    assert cli.run(["train", "--fields"]) == 0
    listed = capsys.readouterr().out
    for table, fields in FIELDS.items():
        section = listed.partition(f"[{table}]")[2].partition("\n[")[0]
        for field in fields - {"rope_parameters"}:
            assert f"\n  {field} = " in section, (table, field)
            if table != "model":
                _, _, told = section.partition(f"\n  {field} = ")
                assert told.split("\n")[1].startswith("      "), f"{field} says nothing"
    assert 'optimizer = "muon" | "adamw", muon if left out' in listed
    assert "steps = int, required" in listed


# --- the text ------------------------------------------------------------------------------------


def test_no_text_is_told(train, tmp_path: Path) -> None:
    assert_told(train(data=None), "the config names no text", "--data")
    assert_told(train(data=tmp_path / "nowhere"), f"no file or folder {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert_told(train(data=tmp_path / "empty"), f"there is no text in {tmp_path / 'empty'}")


def test_too_little_text_for_a_vocabulary_is_told(train, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b")
    assert_told(
        train(data=tmp_path / "short.txt", tokenizer=None), "the text yields only", "of the 300"
    )


def test_a_folder_without_tokenizer_is_told(train, tmp_path: Path) -> None:
    assert_told(train(tokenizer=tmp_path), str(tmp_path), "tokenizer")


def test_weights_of_domains_that_the_text_lacks_are_told(config: Path, train) -> None:
    config.write_text(config.read_text() + "[data.domain_weights]\nmusic = 1.0\n")
    assert_told(train(), "the domain weights name music", "poetry, prose, sums")


def test_a_training_resumes_with_its_own_text_and_vocabulary_only(
    train, corpus: Path, tmp_path: Path
) -> None:
    assert train()[0] == 0
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    write_jsonl(other / "train" / "prose" / "a.jsonl", PROSE[:49])
    assert_told(train("--resume", data=other), "saved position belongs to data", "same text")
    Tokenizer.train_on_texts(PROSE, vocab_size=290, progress=False).save(tmp_path / "tokens")
    assert_told(train("--resume", tokenizer=tmp_path / "tokens"), "same text, tokenizer and seed")


# --- the folder ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_training_is_left_alone(train, tmp_path: Path) -> None:
    assert train()[0] == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert_told(train("--seed", "1"), "already holds a training (4 steps", "--resume")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert_told(train("--seed", "1"), "already holds a model", "choose another folder")
    assert_told(train("--seed", "1", "--resume"), "already holds a model", "choose another folder")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_a_folder_in_which_a_training_is_at_work_is_left_alone(
    train, tmp_path: Path, monkeypatch
) -> None:
    """The other is told whether it would begin or go on, and both are free to afterwards."""
    told: list[tuple[int, str, str]] = []
    take_step = Trainer.train_step

    def step(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 2 and len(told) < 2:
            told.extend([train(), train("--resume")])
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    assert train()[0] == 0
    assert len(told) == 2
    for result in told:
        assert_told(result, f"at work in {tmp_path / 'out'}", "choose another folder")
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4]
    assert train("--resume", "--steps", "5")[0] == 0
    assert not [*(tmp_path / "out").glob("*.lock")]


def test_a_mistake_neither_leaves_nor_takes_a_folder(train, tmp_path: Path) -> None:
    assert_told(train(data=tmp_path / "nowhere"), "no file or folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert_told(train(data=tmp_path / "nowhere"), "no file or folder")
    assert not [*(tmp_path / "out").iterdir()]


def test_a_training_that_never_saved_begins_anew(train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    code, stdout, _ = train("--resume")
    assert code == 0
    assert "there is no checkpoint in" in stdout
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4]
    assert rows(tmp_path / "out")[0]["loss"] != 9.0


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_is_a_file_is_told(name: str, train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert_told(train(out=tmp_path / name), "cannot write", "choose another folder")


def test_a_corrupt_token_file_is_told_and_made_anew(train, tmp_path: Path) -> None:
    assert train()[0] == 0
    [path, *_] = (tmp_path / "out" / "shards" / "train").glob("*.tokens")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_told(train("--resume"), str(path), "corrupt", f"delete the folder {path.parent}")
    shutil.rmtree(path.parent)
    assert train("--resume")[0] == 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_corrupt_checkpoint_is_told_and_an_older_one_continues(
    name: str, damage, train, tmp_path: Path
) -> None:
    assert train()[0] == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    metrics = rows(tmp_path / "out")
    last = tmp_path / "out" / "checkpoints" / "step-000004"
    damage(last / name)
    assert_told(train("--resume"), f"cannot read the checkpoint {last}", "delete it to continue")
    shutil.rmtree(last)
    code, stdout, _ = train("--resume")
    assert code == 0
    assert "continuing from" in stdout and "step-000003" in stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert rows(tmp_path / "out") == metrics


def test_a_copy_of_a_checkpoint_beside_it_is_ignored(train, tmp_path: Path) -> None:
    assert train()[0] == 0
    folder = tmp_path / "out" / "checkpoints"
    shutil.copytree(folder / "step-000003", folder / "step-000003-backup")
    assert train("--resume")[0] == 0
    assert (folder / "step-000003-backup").exists()


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_training_goes_on(
    config: Path, corpus: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """No file may grow past 200 kB, which only a checkpoint does: the model is smaller."""
    arguments = [config, "--data", corpus, "--tokenizer", vocabulary, "--out", tmp_path / "out"]
    limit = (200_000, resource.RLIM_INFINITY)
    process = start(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (0, "")
    assert "step 2: cannot write the checkpoint" in stdout
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))
    assert len(rows(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 200_000
    assert "the model is in" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_learning_a_vocabulary_ends_with_the_training(
    ending: signal.Signals, config: Path, tmp_path: Path
) -> None:
    """The learner sleeps in code that looks at no signal; it ends when its parent does."""
    asleep = """
import ctypes, os, pathlib, sys
from moescope.training import vocabulary
def sleep(*_, **__):
    pathlib.Path(os.environ["LEARNER"]).write_text(str(os.getpid()))
    ctypes.CDLL(None).sleep(600)
vocabulary.Tokenizer.train = sleep
sys.exit(vocabulary._learn("text", "300", "folder"))
"""
    fake = tmp_path / "fake-python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{asleep}'\n")
    fake.chmod(0o755)
    (tmp_path / "text.txt").write_text("some text")
    pid_file = tmp_path / "pid"
    process = start(
        config,
        "--data",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "out",
        main=f"import sys; sys.executable = {str(fake)!r}; {MAIN}",
        env={**os.environ, "OMP_NUM_THREADS": "1", "LEARNER": str(pid_file)},
    )
    while not pid_file.exists() or not pid_file.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    learner = int(pid_file.read_text())
    process.send_signal(ending)
    process.communicate(timeout=60)
    assert process.returncode == (130 if ending == signal.SIGINT else -ending)
    for _ in range(1000):
        if not Path(f"/proc/{learner}").exists():
            return
        time.sleep(0.01)
    raise AssertionError("the learner lives on")


# --- for machines --------------------------------------------------------------------------------


def test_json_is_one_object_on_stdout(train, tmp_path: Path) -> None:
    code, stdout, stderr = train("--json", "--seed", "5", "--steps", "3")
    assert code == 0
    assert stdout.count("\n") == 1
    summary = json.loads(stdout)
    assert summary == json.loads((tmp_path / "out" / "training.json").read_text())
    assert (summary["step"], summary["tokens"]) == (3, 3 * 4 * 24)
    assert summary["config"]["training"]["seed"] == 5
    assert set(summary["held_out_loss"]) == {"poetry", "prose", "sums"}
    assert "the model is in" in stderr


def test_without_json_people_read_where_the_model_is(train, tmp_path: Path) -> None:
    code, stdout, stderr = train()
    assert (code, stderr) == (0, "")
    last = stdout.splitlines()[-1]
    assert last.startswith("step 4: held-out loss poetry ")
    assert last.endswith(f"the model is in {tmp_path / 'out'}")


def test_a_mistake_leaves_stdout_to_json_alone(train) -> None:
    result = train("--json", data=None)
    assert_told(result, "the config names no text")
    assert result[1] == ""
