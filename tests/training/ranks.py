"""Trainings one after another on the ranks that torchrun started, as a file of JSON says.

It is run, by `torchrun ranks.py CASES.json` or alone; each case is `{"config": …, "out": …}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moescope.training import trainer as trainer_module
from moescope.training.config import ParallelConfig, TrainConfig
from moescope.training.kinds import make_kind
from moescope.training.parallel.ranks import Ranks, joined
from moescope.training.text import with_special_ids
from moescope.training.trainer import Trainer


def main() -> None:
    torch.set_num_threads(1)
    trainer_module.measure_gemm_peak = lambda *_: 1e11
    given = json.loads(Path(sys.argv[1]).read_text())
    with joined(ParallelConfig(**given["parallel"])) as ranks:
        for case in given["cases"]:
            run(case, given["parallel"], ranks)


def run(case: dict[str, Any], parallel: dict[str, int], ranks: Ranks) -> None:
    config = TrainConfig.from_file(Path(case["config"]), {"parallel": parallel})
    out = Path(case["out"])
    kind = ranks.first_then_others(lambda: make_kind(config, out, lambda _: None, ranks))
    model = with_special_ids(config.model, kind.tokenizer)
    trainer = Trainer(config.model_copy(update={"model": model}), out, kind, ranks)
    trainer.run(Console(quiet=True))


if __name__ == "__main__":
    main()
