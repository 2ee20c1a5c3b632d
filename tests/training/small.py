"""The smallest training with everything in it, and ways to run and kill it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescope.model.recorder import Recorder
from moescope.model.routing import Routing
from moescope.training.config import TrainConfig
from moescope.training.kinds import make_kind
from moescope.training.trainer import Trainer, train

MAIN = "from moescope.cli.main import main; main()"

TABLES: dict[str, dict[str, Any]] = {
    "model": {
        "model_type": "deepseek_v3",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 64,
    },
    "data": {"sequence_length": 24},
    "training": {"steps": 12, "batch_size": 4, "micro_batch_size": 2, "warmup_fraction": 0.0},
    "balance": {"sequence_aux": 1e-3, "bias_update_speed": 0.01},
    "evaluation": {"tokens": 200},
    "checkpoints": {},
}

ROUTER_FIELDS = {
    "relu": {"num_experts_per_tok": 1},  # at the start half of four experts fire
    "group_limited_greedy": {"n_group": 2, "topk_group": 1},
    "noaux_tc": {"n_group": 2, "topk_group": 2},
}


def write_config(path: Path, **changes: dict[str, Any]) -> Path:
    """Write `TABLES` as TOML with some fields changed; None leaves a field out."""
    lines: list[str] = []
    for table, fields in TABLES.items():
        lines.append(f"[{table}]")
        for name, value in {**fields, **changes.get(table, {})}.items():
            if value is not None:
                lines.append(f"{name} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def start(*arguments: str | Path, main: str = MAIN, **options: Any) -> subprocess.Popen[str]:
    """Start `moescope train` on one thread, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", main, "train", *map(str, arguments)],
        env=options.pop("env", {**os.environ, "OMP_NUM_THREADS": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the logged metrics without the time that steps took."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


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
