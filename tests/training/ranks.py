"""Trainings one after another on the ranks that torchrun started, as a file of JSON says.

It is run, by `torchrun ranks.py CASES.json` or alone; each case is `{"config": …, "out": …}`. With
`"counts": true` each rank writes what it sent in each step, as PyTorch was asked to, into `out`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    if case.get("counts"):
        count_steps(trainer, out / f"sent-{ranks.number}.jsonl")
    trainer.run(Console(quiet=True))


def count_steps(trainer: Trainer, path: Path) -> None:
    step = trainer.train_step

    def counted() -> dict[str, Any]:
        with Sent() as sent:
            row = step()
        with path.open("a") as lines:
            lines.write(json.dumps(sent.bytes) + "\n")
        return row

    trainer.train_step = counted


class Sent(TorchDispatchMode):
    """Counts what a rank has to send for each collective that PyTorch is asked for.

    Attributes:
        bytes: by collective and type of numbers, as in `all_gather float32`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "_allgather_base_":
            self.add("all_gather", args[1], others(args[2]))
        elif name == "_reduce_scatter_base_":
            self.add("reduce_scatter", args[0], others(args[2]))
        elif name == "allreduce_":
            for tensor in args[0]:
                self.add("all_reduce", tensor, 2 * others(args[1]) / (others(args[1]) + 1))
        elif name == "alltoall_base_":
            group = dist.ProcessGroup.unbox(args[2])
            rows, own = args[1], args[4][dist.get_rank(group)]
            self.add("all_to_all", rows, (len(rows) - own) / max(len(rows), 1))
        elif name == "all_gather_into_tensor":
            self.add("all_gather of matrices", args[0], args[1] - 1)
        return result

    def add(self, collective: str, tensor: torch.Tensor, times: float) -> None:
        key = f"{collective} {str(tensor.dtype).removeprefix('torch.')}"
        self.bytes[key] = self.bytes.get(key, 0) + tensor.nbytes * times


def others(group: Any) -> int:
    return dist.ProcessGroup.unbox(group).size() - 1


if __name__ == "__main__":
    main()
