"""How far the speed that `moescope plan --speed` predicts is from the speed that is measured.

    python benchmarks/plan_prediction.py --shapes tiny,S --rounds 5 --json prediction.json

Each round predicts from the config alone, then measures the whole model with random weights: a
prompt of 512 random tokens, then 128 more, one after another, of which the first 8 warm up. Both
are compared within a round, because a shared machine moves from minute to minute; reported are
the medians over the rounds, and the median of the rounds' ratios with its range.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cpu_inference import COMMON, LITE, SHAPES
from peers import Moescope
from rich.console import Console
from rich.table import Table

from moescope.catalog import catalog
from moescope.families import config_fields, read_config
from moescope.kernels import cpu
from moescope.lab.speed import PROMPT, predict_format
from moescope.machine import Machine
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.native.weight_format import FORMATS

MID = COMMON | {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": config_fields(catalog()["tiny"].config),
    "S": SHAPES["S"],
    "mid": MID,
    "L3": LITE | {"num_hidden_layers": 3},
}
"""The model in the box; S of `cpu_inference.py`; one between; DeepSeek-V2-Lite, 3 of 27 layers."""
NEW_TOKENS, WARM_TOKENS = 128, 8
KEYS, KINDS = ("prefill", "decode"), ("predicted", "measured")


def measure(model: CausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Tokens per second of a prompt and of what follows it, of `(1, PROMPT + NEW_TOKENS)` ids."""
    cache, times = Cache(), []
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, ids.shape[1]))]:
        began = time.perf_counter()
        states = model(ids[:, start:end], torch.arange(start, end)[None], cache)
        model.logits(states[:, -1]).argmax(dim=-1)
        times.append(time.perf_counter() - began)
    return {"prefill": PROMPT / times[0], "decode": 1 / statistics.fmean(times[1 + WARM_TOKENS :])}


@torch.inference_mode()
def run(shape: str, weight_format: str, rounds: int) -> dict[str, Any]:
    """Predict and measure one shape in one format, in turns, after a measurement to warm up."""
    config = read_config(CONFIGS[shape])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, PROMPT + NEW_TOKENS), generator=generator)
    is_packed = weight_format in FORMATS
    runner = Moescope.native(config, weight_format) if is_packed else Moescope.reference(config)
    model = runner.model
    measure(model, ids)
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        speed = predict_format(config, weight_format, PROMPT, bandwidth=1.0, peak=float("inf"))
        predicted = {"prefill": speed.prefill, "decode": speed.decode}
        found.append({"predicted": predicted, "measured": measure(model, ids)})
    return {
        "shape": shape,
        "format": weight_format,
        "rounds": found,
        "median": {
            kind: {key: statistics.median(row[kind][key] for row in found) for key in KEYS}
            for kind in KINDS
        },
        "ratio": {
            key: sorted(row["predicted"][key] / row["measured"][key] for row in found)
            for key in KEYS
        },
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print one row for each shape and format."""
    table = Table(box=None)
    for head in ("shape", "format", *(f"{key}: {kind}" for key in KEYS for kind in KINDS)):
        table.add_column(head)
    for key in KEYS:
        table.add_column(f"{key}: ratio")
    for result in results:
        rates = [f"{result['median'][kind][key]:,.0f}" for key in KEYS for kind in KINDS]
        ratios = [
            f"{statistics.median(r):.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in result["ratio"].values()
        ]
        table.add_row(result["shape"], result["format"], *rates, *ratios)
    Console(width=140).print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(CONFIGS), help="of " + ", ".join(CONFIGS))
    parser.add_argument("--formats", default="int8,int4", help="of int8, int4, bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    given = parser.parse_args()
    shapes = given.shapes.split(",")
    if unknown := set(shapes) - set(CONFIGS):
        parser.error(f"there is no shape {unknown.pop()!r}; choose from {', '.join(CONFIGS)}")
    results = [
        run(shape, weight_format, given.rounds)
        for shape in shapes
        for weight_format in given.formats.split(",")
    ]
    show(results)
    if given.json is not None:
        found = {"machine": Machine.detect().cpu, "threads": cpu.threads(), "results": results}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
