"""A training's history from what the trainer writes, whole and in pieces."""

import json
from pathlib import Path
from typing import Any

import pytest

from moescope.errors import UserError
from moescope.scope.history import MOST_ROWS, Follower, History, history_of


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
