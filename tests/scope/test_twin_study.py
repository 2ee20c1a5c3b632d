"""What a study of twins has to hold."""

import json
from typing import Any

import pytest

from moescope.errors import UserError
from moescope.scope.twin_study import FILE, TwinStudy


def study() -> dict[str, Any]:
    lead = {"value": 0.1, "low": 0.05, "high": 0.15}
    return {
        "runs": [
            {
                **{"name": name, "parameters": 30, "active": 9, "tokens": 5, "seconds": 2.0},
                **{"held_out": {"prose": 4.0}, "lead": None if name == "mixture" else lead},
            }
            for name in ("mixture", "active", "total")
        ]
    }


def test_a_study_is_read_as_it_was_written() -> None:
    assert TwinStudy.from_json(json.dumps(study())).runs[2].lead.value == 0.1  # type: ignore
    if FILE.exists():
        assert TwinStudy.from_file(FILE).runs[0].name == "mixture"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda runs: runs.pop(), "the runs are mixture, active; they have to be"),
        (lambda runs: runs[1].pop("tokens"), r"runs\.1\.tokens: Field required"),
        (lambda runs: runs[1].update(seconds="long"), r"runs\.1\.seconds: .* valid number"),
        (lambda runs: runs[2].update(held_out={"code": 1.0}), "total was not measured on"),
        (lambda runs: runs[2].update(lead=None), "total has to say how far"),
        (lambda runs: runs[0].update(lead=runs[1]["lead"]), "mixture has to say how far"),
    ],
)
def test_a_damaged_study_is_refused(change: Any, said: str) -> None:
    told = study()
    change(told["runs"])
    with pytest.raises(UserError, match=f"this is no study of twins: .*{said}"):
        TwinStudy.from_json(json.dumps(told))
