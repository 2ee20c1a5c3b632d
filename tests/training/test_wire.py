"""What `wire` says that a step sends, against what PyTorch was asked to send in real steps."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small import TABLES, rows, write_config
from test_parallel import RANKS, finished, torchrun

from moescope.catalog import catalog
from moescope.families import read_config
from moescope.training.config import ParallelConfig
from moescope.training.parallel.wire import places_visited, wire

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]
"""Ranks of `data` and `expert`."""
STEPS = 3
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "muon, bfloat16": {},
    "adamw, float32": {"training": {"optimizer": "adamw", "dtype": "float32"}},
    "rows that cannot be dealt evenly": {
        "model": {"vocab_size": 301, "moe_intermediate_size": 17, "intermediate_size": 47}
    },
    "fewer experts than ranks of data": {
        "model": {"n_routed_experts": 2, "num_experts_per_tok": 1},
        "training": {"optimizer": "adamw"},
    },
    "no weight of the router learns": {"model": {"topk_method": "random"}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "expert"), SHAPES)
def test_a_step_sends_what_wire_says(
    data: int, expert: int, tmp_path: Path, corpus: Path, vocabulary: Path
) -> None:
    cases: list[dict[str, Any]] = []
    chosen = {
        case: changes
        for case, changes in CASES.items()
        if changes.get("model", {}).get("n_routed_experts", 4) % expert == 0
    }
    for case, changes in chosen.items():
        training = {"steps": STEPS, "batch_size": 8, "micro_batch_size": 4}
        tables = {**changes, "training": {**training, **changes.get("training", {})}}
        tables["data"] = {"source": str(corpus), "tokenizer": str(vocabulary)}
        out = tmp_path / case
        out.mkdir()
        path = write_config(tmp_path / f"{case}.toml", **tables)
        cases.append({"config": str(path), "out": str(out), "counts": True})
    told = tmp_path / "cases.json"
    parallel = {"data": data, "expert": expert}
    told.write_text(json.dumps({"parallel": parallel, "cases": cases}))
    finished(torchrun(data * expert, RANKS, told))
    for case, changes in chosen.items():
        config = read_config({**TABLES["model"], **changes.get("model", {})})
        is_float32 = changes.get("training", {}).get("dtype") == "float32"
        for step, row in enumerate(rows(tmp_path / case)):
            sent: Counter[str] = Counter()
            for rank in range(data * expert):
                lines = (tmp_path / case / f"sent-{rank}.jsonl").read_text().splitlines()
                assert len(lines) == STEPS
                sent.update(json.loads(lines[step]))
            expected = wire(
                config,
                ParallelConfig(data=data, expert=expert),
                parts=2,
                crossings=row["traffic"]["crossings"] if expert > 1 else 0,
                number=4 if is_float32 else 2,
                muon="optimizer" not in changes.get("training", {}),
            )
            number = "float32" if is_float32 else "bfloat16"
            assert sent.pop(f"all_gather {number}", 0) == expected.weights
            assert sent.pop("reduce_scatter float32", 0) == expected.gradients
            assert sent.pop("all_reduce float32", 0) == expected.copies
            assert sent.pop("all_gather of matrices float32", 0) == expected.matrices
            travelled = sum(sent.pop(name) for name in list(sent) if name.startswith("all_to_all"))
            assert travelled == expected.dispatch + expected.combine
            if expert > 1:
                assert row["traffic"]["bytes"] == travelled > 0
            # What is left are a few numbers a layer: loads, rows that come, norms and losses.
            assert sum(sent.values()) < 0.01 * expected.total
            assert all(name.endswith(("int64", "float64")) for name in sent)


@pytest.mark.parametrize("places", [1, 2, 4, 8])
def test_tokens_visit_as_many_places_as_even_choices_do(places: int) -> None:
    fields = {"n_routed_experts": 32, "num_experts_per_tok": 6, "topk_method": "greedy"}
    config = read_config({**TABLES["model"], **fields})
    missed = math.comb(32 - 32 // places, 6) / math.comb(32, 6)
    assert places_visited(config, places) == pytest.approx(places * (1 - missed), rel=0.01)


def test_v3s_tokens_visit_four_nodes_of_eight_at_most() -> None:
    config = catalog()["deepseek-v3"].config  # 8 groups, of which a token visits 4
    assert 3.5 < places_visited(config, 8) < 4
    assert places_visited(config, 1) == pytest.approx(1)
    unlimited = config.model_copy(update={"n_group": 1, "topk_group": 1})
    assert places_visited(unlimited, 8) > 5
