"""A training's history from what the trainer writes, whole and in pieces."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moescope.errors import UserError
from moescope.scope.history import (
    MOST_ROWS,
    ExpertsSnapshot,
    Follower,
    History,
    TrainingRow,
    history_of,
)


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 1 / step, "seconds": 1.0, **more}) + "\n"


def test_a_dense_training_has_rows_and_no_snapshots(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2, held_out_loss={"a": 0.123456}))
    (tmp_path / "expert_load.jsonl").write_text('{"step": 2, "load": {"a": {}}}\n')
    history = history_of(tmp_path)
    assert [row.held_out for row in history.rows] == [{}, {"a": 0.1235}]
    assert (history.steps, history.domains, history.snapshots) == (2, ["a"], [])
    history.save(tmp_path / "training_history.json")
    assert History.from_file(tmp_path / "training_history.json") == history


def test_layers_stand_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1))
    load = {"b": {"10": [3, 1], "9": [0, 2]}, "a": {"9": [0, 0], "10": [1, 1]}}
    text = json.dumps({"step": 1, "load": load}) + "\n"
    (tmp_path / "expert_load.jsonl").write_text(text)
    (snapshot,) = history_of(tmp_path).snapshots
    assert snapshot.load == [[[0.0, 1.0], [0.75, 0.25]], [[0.0, 0.0], [0.5, 0.5]]]


def test_long_trainings_are_thinned_but_keep_their_evaluations(tmp_path: Path) -> None:
    steps = 5 * MOST_ROWS
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            stream.write(line(step, **({"held_out_loss": {"a": 1.0}} if step % 99 == 0 else {})))
    rows = history_of(tmp_path).rows
    assert len(rows) <= MOST_ROWS + steps // 99 + 1
    assert (rows[0].step, rows[-1].step) == (1, steps)
    assert [row.step for row in rows if row.held_out] == list(range(99, steps + 1, 99))


def test_the_planned_steps_are_known_from_a_checkpoint_and_the_summary(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2)[:7])  # half a line: it runs now
    assert history_of(tmp_path).steps == 1
    state = tmp_path / "checkpoints" / "step-000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"config": {"training": {"steps": 70}}}))
    assert history_of(tmp_path).steps == 70
    (tmp_path / "training.json").write_text(json.dumps({"config": {"training": {"steps": 80}}}))
    assert history_of(tmp_path).steps == 80


def test_no_training_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no training in .*metrics\.jsonl"):
        history_of(tmp_path)


def test_a_follower_sees_whole_lines_once_and_starts_again_after_a_resumption(
    tmp_path: Path,
) -> None:
    follower, file = Follower(tmp_path), tmp_path / "metrics.jsonl"
    assert follower.new_rows() == []  # nothing is written yet
    with file.open("w") as stream:
        stream.write(line(1) + line(2)[:8])
        stream.flush()
        assert [row.step for row in follower.new_rows()] == [1]
        assert follower.new_rows() == []
        stream.write(line(2)[8:])
        stream.flush()
        assert [row.step for row in follower.new_rows()] == [2]
    resumed = tmp_path / "new"
    resumed.write_text(line(1))
    resumed.replace(file)  # as the trainer does
    assert [row.step for row in follower.new_rows()] == [1]


def training(steps: int, domains: list[str]) -> History:
    rows = [TrainingRow(step, 1 / step, {}, {"1": 0.5}) for step in range(1, steps + 1)]
    rows[-1] = TrainingRow(steps, 1 / steps, dict.fromkeys(domains, 2.0), {"1": 0.5})
    load = [[[0.25 + at, 0.75 - at]] for at in range(len(domains))]
    return History(steps, domains, rows, [ExpertsSnapshot(steps, load)])


def test_a_training_that_went_on_is_one_history() -> None:
    first, second = training(7, ["code", "verse"]), training(5, ["code", "maps", "prose"])
    whole = second.after(first)
    assert (whole.steps, whole.domains) == (12, ["code", "maps", "prose", "verse"])
    assert [row.step for row in whole.rows] == list(range(1, 13))
    assert [row.loss for row in whole.rows[7:]] == [row.loss for row in second.rows]
    assert [set(row.held_out) for row in whole.rows if row.held_out] == [
        {"code", "verse"},
        {"code", "maps", "prose"},
    ]
    nobody = [[0.0, 0.0]]
    code, verse = first.snapshots[0].load
    assert whole.snapshots == [
        ExpertsSnapshot(7, [code, nobody, nobody, verse]),
        ExpertsSnapshot(12, [*second.snapshots[0].load, nobody]),
    ]


def test_long_histories_stay_evenly_thin_however_often_they_are_joined() -> None:
    steps = 2 * MOST_ROWS
    whole = training(steps, ["a"])
    for _ in range(3):
        whole = training(steps, ["a"]).after(whole)
    assert len(whole.rows) <= MOST_ROWS + 4
    at = [row.step for row in whole.rows]
    assert (at[0], at[-1]) == (1, 4 * steps)
    assert max(b - a for a, b in itertools.pairwise(at)) <= 2 * (4 * steps // MOST_ROWS)
    assert [row.step for row in whole.rows if row.held_out] == [n * steps for n in (1, 2, 3, 4)]
    assert whole.sittings == [n * steps for n in (1, 2, 3)]


def test_what_was_measured_of_the_kept_weights_counts_last() -> None:
    history = training(5, ["a"])
    assert history.last_held_out == {"a": 2.0}
    assert replace(history, held_out={"b": 1.0}).last_held_out == {"b": 1.0}
    assert History(1, [], [TrainingRow(1, 1.0, {}, {})], []).last_held_out == {}
