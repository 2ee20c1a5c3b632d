"""Trainings on several ranks against the same training in one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import ROUTER_FIELDS, rows, write_config
from test_rl import rl_config
from test_sft import chat, start, talker, write_chats  # noqa: F401

from moescope.cli import main as cli
from moescope.model.routing import ROUTERS
from moescope.training.state import saved_steps

pytestmark = pytest.mark.xdist_group("ranks")  # whose processes fill the machine

RANKS = Path(__file__).parent / "ranks.py"
LOSSES = ("loss", "further_tokens_loss", "balance_loss", "gradient_norm")
SHAPES = [(1, 2), (2, 1), (2, 2), (1, 4)]
"""Ranks of `data` and `expert`."""
CASES: dict[str, dict[str, dict[str, Any]]] = {
    router: {
        "model": {"topk_method": router, **ROUTER_FIELDS.get(router, {})},
        "training": {"optimizer": "adamw"},
        "balance": {"expert_aux": 0.01, "device_aux": 0.01, "device_groups": 2, "z_loss": 1e-3},
    }
    for router in ROUTERS
}
CASES["muon"] = {}
CASES["whole step"] = {
    "training": {"micro_batch_size": None, "optimizer": "adamw"},
    "balance": {"expert_aux": 0.01},
}
CASES["checkpointed"] = {"training": {"checkpoint_activations": True, "optimizer": "adamw"}}
CASES["two experts"] = {  # of which two ranks of data and two of expert deal the rows
    "model": {"n_routed_experts": 2, "num_experts_per_tok": 1},
    "training": {"optimizer": "adamw"},
}
CASES["biased experts"] = {
    "model": {
        "model_type": "gpt_oss",
        "layer_types": ["full_attention", "full_attention"],
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "training": {"optimizer": "adamw"},
}


def torchrun(ranks: int, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start so many ranks on one thread each."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(ranks), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for the end of a process; return what it has said."""
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == code, stderr
    return stdout, stderr


def deals(case: str, expert: int) -> bool:
    """Whether so many ranks have at least an expert each."""
    return case != "two experts" or expert <= 2


def run_cases(folder: Path, corpus: Path, vocabulary: Path, data: int, expert: int) -> Path:
    """Train all cases on so many ranks, in `folder`."""
    cases = []
    for case, changes in CASES.items():
        if not deals(case, expert):
            continue
        training = {"steps": 5, "dtype": "float32", "batch_size": 8, "micro_batch_size": 4}
        tables = {**changes, "training": {**training, **changes.get("training", {})}}
        tables["data"] = {"source": str(corpus), "tokenizer": str(vocabulary)}
        tables["evaluation"] = {"every": 3}
        out = folder / case
        out.mkdir(parents=True)
        path = write_config(folder / f"{case}.toml", **tables)
        cases.append({"config": str(path), "out": str(out)})
    told = folder / "cases.json"
    told.write_text(json.dumps({"parallel": {"data": data, "expert": expert}, "cases": cases}))
    if data * expert == 1:
        subprocess.run([sys.executable, RANKS, told], check=True, timeout=280)
    else:
        finished(torchrun(data * expert, RANKS, told))
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path, vocabulary: Path) -> Path:
    """The folder of all cases, each trained by one process."""
    return run_cases(tmp_path_factory.mktemp("alone"), corpus, vocabulary, 1, 1)


@pytest.fixture(scope="session", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def together(request, tmp_path_factory: pytest.TempPathFactory, corpus: Path, vocabulary: Path):
    """The folder of all cases, trained by several ranks, and how these are arranged."""
    folder = tmp_path_factory.mktemp("together")
    return run_cases(folder, corpus, vocabulary, *request.param), *request.param


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one_process_does(case: str, alone: Path, together) -> None:
    folder, _, expert = together
    if not deals(case, expert):
        pytest.skip("there are fewer experts than ranks")
    ours, theirs = rows(folder / case), rows(alone / case)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5]
    for one, other in zip(ours, theirs, strict=True):
        if case == "muon":  # which rounds to bf16, so that the last bits of float32 count at times
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            continue
        for name in LOSSES:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        for name in ("max_violation", "experts_per_token", "held_out_loss", "router"):
            assert (name in one) == (name in other)
            assert_alike(one.get(name, {}), other.get(name, {}))
        assert ("traffic" in one) == (expert > 1)
    if case == "muon":
        return
    ours, theirs = (load_file(f / case / "model.safetensors") for f in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)


def assert_alike(one: Any, other: Any) -> None:
    if isinstance(one, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_alike(one[name], other[name])
    else:
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_a_router_that_limits_groups_limits_ranks(together) -> None:
    folder, _, expert = together
    if expert == 1:
        pytest.skip("experts are not dealt")
    limited = [row["traffic"] for row in rows(folder / "group_limited_greedy")]
    free = [row["traffic"] for row in rows(folder / "greedy")]
    assert all(row["ranks_per_token"] <= expert / 2 for row in limited)  # one group of two
    assert all(row["ranks_per_token"] > 1 for row in free)
    assert all(0 < row["crossing_share"] < 1 and row["bytes"] > 0 for row in limited + free)


# --- other kinds ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("data", "expert"), [(1, 2), (2, 1)])
def test_ranks_learn_chats_as_one_process_does(
    data: int,
    expert: int,
    start: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pairs = [chat(f"{n}?", f"{n} " * (1 + n % 4) + ".") for n in range(30)]
    write_chats(tmp_path / "chats" / "train" / "echo" / "a.jsonl", pairs[:24])
    write_chats(tmp_path / "chats" / "held_out" / "echo" / "a.jsonl", pairs[24:])
    training = {"dtype": "float32", "steps": 5, "optimizer": "adamw"}
    config = write_config(tmp_path / "c.toml", training=training, balance={"expert_aux": 0.01})
    text = config.read_text()
    config.write_text('kind = "sft"\n' + text[text.index("[data]") :])
    arguments = ["train", str(config), "--data", str(tmp_path / "chats")]
    arguments += ["--start-from", str(start), "--out"]
    one_process([*arguments, str(tmp_path / "alone")])
    together_on(data, expert, [*arguments, str(tmp_path / "together")])
    for one, other in zip(*(rows(tmp_path / out) for out in ("together", "alone")), strict=True):
        one.pop("traffic", None)
        assert_alike(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "expert", "switches"),
    [
        (1, 2, {"sampler": "int8", "replay": True, "kl": 0.001}),
        (2, 1, {"sampler": "live", "replay": False, "normalisation": "dr_grpo"}),
    ],
)
def test_ranks_learn_from_answers_as_one_process_does(
    data: int,
    expert: int,
    switches: dict[str, Any],
    start: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = rl_config(tmp_path, **switches)
    # After more steps a draw may fall otherwise: weights agree up to rounding, draws have edges.
    arguments = ["train", str(config), "--start-from", str(start), "--steps", "2", "--out"]
    one_process([*arguments, str(tmp_path / "alone")])
    together_on(data, expert, [*arguments, str(tmp_path / "together")])
    for one, other in zip(*(rows(tmp_path / out) for out in ("together", "alone")), strict=True):
        for name in ("reward", "answer_tokens", "groups_that_teach", "gradient_norm", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one.get("accuracy") == other.get("accuracy")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def line(tmp_path: Path, corpus: Path, vocabulary: Path):
    """Return a function that makes `moescope train`'s arguments for so many steps."""

    def make(out: str, steps: int, *more: str, **training: Any) -> list[str]:
        recipe = {"dtype": "float32", "batch_size": 4, "micro_batch_size": 4, "steps": 9}
        recipe |= {"decay_fraction": 0.0, "optimizer": "adamw", **training}
        config = write_config(
            tmp_path / "config.toml",
            training=recipe,
            checkpoints={"every": 2, "keep": 9},
            evaluation={"every": 2, "tokens": 24},
        )
        return [
            *("train", str(config), "--out", str(tmp_path / out), "--steps", str(steps)),
            *("--data", str(corpus), "--tokenizer", str(vocabulary), *more),
        ]

    return make


def one_process(arguments: list[str]) -> tuple[str, str]:
    return finished(
        subprocess.Popen(
            [sys.executable, "-m", "moescope", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def together_on(data: int, expert: int, arguments: list[str], **options: Any) -> tuple[str, str]:
    shape = ["--parallel", f"data={data},expert={expert}"]
    return finished(torchrun(data * expert, "-m", "moescope", *arguments, *shape, **options))


@pytest.mark.slow
def test_a_training_goes_on_with_other_numbers_of_ranks(line, tmp_path: Path) -> None:
    one_process(line("straight", 8))
    together_on(2, 2, line("moved", 2))
    assert (tmp_path / "moved" / "checkpoints" / "step-000002" / "sha256.json").exists()
    together_on(1, 2, line("moved", 4, "--resume"))
    one_process(line("moved", 6, "--resume"))
    said, _ = together_on(2, 1, line("moved", 8, "--resume"))
    assert "step-000006" in said and "2 processes, data 2 x expert 1" in said
    straight, moved = rows(tmp_path / "straight"), rows(tmp_path / "moved")
    for one, other in zip(moved, straight, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("moved", "straight"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)


def children(agent: int) -> list[int]:
    """Return the ranks that a torchrun has started, the last one last."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True)
    return sorted(map(int, listed.stdout.split()))


def wait_for_step(out: Path, step: int) -> None:
    for _ in range(1200):
        if step in saved_steps(out / "checkpoints"):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint of step {step}")


@pytest.mark.slow
def test_a_killed_rank_is_told_once_and_all_start_again(line, tmp_path: Path) -> None:
    together_on(1, 2, line("straight", 200))
    shape = ["--parallel", "data=1,expert=2"]
    process = torchrun(2, "--max-restarts", "1", "-m", "moescope", *line("killed", 200), *shape)
    wait_for_step(tmp_path / "killed", 4)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said, complained = finished(process)
    assert "continuing from" in said
    told = [text for text in complained.splitlines() if text.startswith("moescope: ")]
    assert len(told) == 1, complained
    assert "another process of this training was lost" in told[0] and "--resume" in told[0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("killed", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_interrupted_ranks_save_the_same_step(line, tmp_path: Path) -> None:
    shape = ["--parallel", "data=2,expert=1"]
    process = torchrun(2, "-m", "moescope", *line("stopped", 400), *shape)
    wait_for_step(tmp_path / "stopped", 4)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=120)
    stopped = re.search(r"stopped at step (\d+)", said)
    assert stopped, complained
    assert saved_steps(tmp_path / "stopped" / "checkpoints")[-1] == int(stopped[1])
    assert "Error" not in complained.split("moescope", 1)[0]


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "changes", "words"),
    [
        ("expert=2", {}, ["asks for 2 processes", "torchrun --nproc-per-node 2 -m moescope"]),
        ("expert=3", {}, ["n_routed_experts 4", "the 3 ranks of `expert`"]),
        ("data=3", {}, ["micro_batch_size 2", "3 ranks (data 3 x expert 1)"]),
        ("data=0", {}, ["`parallel.data` is '0'", "greater than 0"]),
        ("data", {}, ["--parallel data says no numbers", "--parallel data=2,expert=1"]),
        ("rows=2", {}, ["--parallel rows=2 says no numbers"]),
        ("expert=2", {"n_routed_experts": None, "first_k_dense_replace": None}, ["has none"]),
    ],
)
def test_a_mistake_is_one_sentence(
    parallel: str,
    changes: dict[str, Any],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes:
        changes |= {"model_type": "llama", "num_experts_per_tok": None, "n_shared_experts": None}
        changes |= {"num_key_value_heads": 2, "num_nextn_predict_layers": None}
    config = write_config(tmp_path / "config.toml", model=changes)
    code = cli.run(["train", str(config), "--out", str(tmp_path / "out"), "--parallel", parallel])
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("moescope: ") and told.count("\n") == 1, told
    for word in words:
        assert word in told


@pytest.mark.slow
def test_ranks_that_the_config_does_not_name_are_told_once(line) -> None:
    process = torchrun(2, "-m", "moescope", *line("out", 4))
    _, complained = process.communicate(timeout=120)
    told = [text for text in complained.splitlines() if text.startswith("moescope: ")]
    assert told == [
        "moescope: torchrun started 2 processes, but [parallel] deals the training to 1 (data 1 x "
        "expert 1); say otherwise with --parallel data=2 or with --nproc-per-node"
    ]
    assert "exitcode  : 2" in complained
