"""Studies: what they vary, what they hold still, how they resume, and their statistics."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from moescope.errors import UserError
from moescope.lab import study as module, trainings
from moescope.lab.routers import BASE, STUDIES, Case, base_config
from moescope.lab.study import Row, Study, run_study, summarise
from moescope.model.costs import count_parameters
from moescope.model.routing import ROUTERS
from moescope.scope.resampling import t_interval
from moescope.training import trainer
from moescope.training.config import TrainConfig

MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    source: Path = tmp_path_factory.mktemp("text")
    for domain, text in (("poems", "第{}首：床前明月光，疑是地上霜。"), ("sums", "{} + 1 = ?")):
        for part, numbers in (("train", range(40)), ("held_out", range(40, 60))):
            (source / part / domain).mkdir(parents=True)
            lines = [json.dumps({"text": text.format(n)}) + "\n" for n in numbers]
            (source / part / domain / "a.jsonl").write_text("".join(lines))
    return base_config(
        BASE,
        {
            "model": MODEL,
            "data": {"source": source, "sequence_length": 16},
            "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 4},
            "evaluation": {"tokens": 200},
        },
    )


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trainer, "measure_gemm_peak", lambda dtype: 1e9)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class HereAndNow:
    """Stands in for the pool of processes: does a task when it is asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "HereAndNow":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function, task):
        from concurrent.futures import Future

        future: Future = Future()
        future.set_result(function(task))
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "ProcessPoolExecutor", HereAndNow)


def run(name: str, base: TrainConfig, out: Path, seeds: int = 2) -> Study:
    told: list[tuple[int, int]] = []
    done = run_study(
        name,
        base,
        out,
        seeds=seeds,
        workers=1,
        command="moescope study",
        progress=lambda *steps: told.append(steps),
    )
    assert all(steps == in_all for steps, in_all in told[-1:])
    return done


# --- what is varied ----------------------------------------------------------------------------


def test_the_study_of_routers_has_every_router() -> None:
    built_in = base_config(BASE, {})
    cases = STUDIES["routers"](built_in.model)
    assert {case.config(built_in, 0).model.topk_method for case in cases} == set(ROUTERS)


@pytest.mark.parametrize("name", ["granularity", "shared"])
def test_total_and_active_size_stay_the_same(name: str) -> None:
    built_in = base_config(BASE, {})
    sizes = [
        count_parameters(case.config(built_in, 0).model) for case in STUDIES[name](built_in.model)
    ]
    assert len(sizes) >= 3
    experts = {size.routed_experts + size.shared_experts for size in sizes}
    assert len(experts) == 1
    active = [size.active - size.router for size in sizes]  # more experts need a larger router
    assert max(active) - min(active) == 0


def test_the_study_of_balance_changes_nothing_but_the_balance() -> None:
    built_in = base_config(BASE, {})
    configs = [case.config(built_in, 1) for case in STUDIES["balance"](built_in.model)]
    assert all(config.model == configs[0].model for config in configs)
    assert all(config.training == configs[0].training for config in configs)
    assert len({config.balance.model_dump_json() for config in configs}) == len(configs)


def test_the_built_in_shape_is_as_small_as_it_says() -> None:
    parameters = count_parameters(base_config(BASE, {}).model)
    assert parameters.total == pytest.approx(3.2e6, rel=0.02)
    assert parameters.active == pytest.approx(1.1e6, rel=0.02)


# --- running -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases, two seeds each."""
    out: Path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "ProcessPoolExecutor", HereAndNow)
        patch.setattr(trainer, "measure_gemm_peak", lambda dtype: 1e9)
        patch.setitem(
            STUDIES, "pair", lambda _: [Case("same"), Case("relu", {"topk_method": "relu"})]
        )
        run("pair", base, out)
    return out


def test_rows_hold_what_a_reader_needs(finished: Path) -> None:
    study = Study.from_file(finished / "study.json")
    assert [(row.case, row.seed) for row in study.rows] == [
        ("same", 0),
        ("relu", 0),
        ("same", 1),
        ("relu", 1),
    ]
    for row in study.rows:
        assert row.command == "moescope study"
        assert row.version
        assert row.config["training"]["seed"] == row.seed
        assert set(row.held_out_loss) == {"poems", "sums"}
        assert row.tokens == 3 * 4 * 16
        assert set(row.max_violation) == set(row.mutual_information) == {0, 1}
    same, relu = study.rows[0], study.rows[1]
    assert same.experts_per_token == 2
    assert relu.config["model"]["topk_method"] == "relu"
    assert same.held_out_loss != study.rows[2].held_out_loss


@pytest.mark.slow
def test_processes_make_the_same_rows(
    base: TrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case("same"), Case("relu", {"topk_method": "relu"})]
    monkeypatch.setitem(STUDIES, "pair", lambda _: cases)
    found = run("pair", base, tmp_path)
    expected = Study.from_file(finished / "study.json")
    losses = [[row.held_out_loss for row in study.rows] for study in (found, expected)]
    assert losses[0] == losses[1]


def test_a_finished_study_is_not_trained_again(
    base: TrainConfig, finished: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    cases = [Case("same"), Case("relu", {"topk_method": "relu"})]
    monkeypatch.setitem(STUDIES, "pair", lambda _: cases)
    monkeypatch.setattr(module, "run_task", lambda task: pytest.fail("trained again"))
    before = (finished / "study.json").read_text()
    run("pair", base, finished)
    assert (finished / "study.json").read_text() == before


def test_other_options_in_the_same_folder_are_refused(
    base: TrainConfig, finished: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setitem(STUDIES, "pair", lambda _: [Case("same")])
    longer = base.model_copy(update={"training": base.training.model_copy(update={"steps": 5})})
    with pytest.raises(UserError, match="holds a training of another config"):
        run("pair", longer, finished)


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """Ends with the same numbers as one that was never interrupted."""
    monkeypatch.setitem(STUDIES, "one", lambda _: [Case("same")])
    whole = run("one", base, tmp_path / "whole")
    step = trainer.Trainer.train_step

    def stop_after_two(self: trainer.Trainer):
        row = step(self)
        if self.step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(trainer.Trainer, "train_step", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run("one", base, tmp_path / "broken")
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    again = run("one", base, tmp_path / "broken")
    losses = [[row.held_out_loss for row in study.rows] for study in (whole, again)]
    assert losses[0] == losses[1]


def test_mistakes_are_sentences(base: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study 'router'; choose from routers, granularity"):
        run("router", base, tmp_path)
    (tmp_path / "dense.toml").write_text(
        '[model]\nmodel_type = "llama"\nvocab_size = 300\nhidden_size = 16\n'
        "intermediate_size = 32\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"
        "[training]\nsteps = 1\n[data]\nsequence_length = 16\n"
    )
    with pytest.raises(UserError, match="describes a dense model"):
        base_config(tmp_path / "dense.toml", {})


# --- statistics --------------------------------------------------------------------------------


def test_intervals_over_seeds_are_students() -> None:
    values = [1.0, 1.5, 0.7, 1.2]
    found = t_interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.value == pytest.approx(np.mean(values))


def test_cases_are_compared_seed_by_seed(finished: Path) -> None:
    row = Study.from_file(finished / "study.json").rows[0]

    def made(case: str, seed: int, loss: float) -> Row:
        return dataclasses.replace(row, case=case, seed=seed, held_out_loss={"d": loss})

    losses = {"first": [3.0, 4.0, 5.0], "second": [3.1, 4.2, 5.1]}
    rows = [made(case, seed, loss) for case, ls in losses.items() for seed, loss in enumerate(ls)]
    first, second = summarise(rows)
    theirs = stats.ttest_rel(losses["second"], losses["first"]).confidence_interval(0.95)
    against = second.against_first["held_out_loss"]
    assert (against.low, against.high) == pytest.approx((theirs.low, theirs.high))
    assert first.against_first["held_out_loss"].value == 0
    assert second.measures["held_out_loss"].value == pytest.approx(12.4 / 3)
