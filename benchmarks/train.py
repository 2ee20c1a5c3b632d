"""Training speed: moescope against `transformers`, the same network and tokens, in one run.

    python benchmarks/train.py --rounds 5 --json train.json
    python benchmarks/train.py --device cuda --config MOE.toml --json train.json

Each round measures the device's bf16 GEMM peak (the share of it that a training reaches is its
MFU), then takes steps with moescope (Muon as in the
recipe, and AdamW alone) and with `transformers` (bf16 autocast, `grouped_mm` experts, fused
AdamW), so that all meet the same moment of a shared machine. A step is forward, backward and
optimizer over the same random tokens. Ratios are taken within a round; medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config

from moescope import kernels
from moescope.errors import UserError
from moescope.families import config_fields
from moescope.machine import choose_device, measure_gemm_peak
from moescope.model.decoder import CausalLM, initialise, without_numbers
from moescope.training.allocator import keep_freed_memory
from moescope.training.config import TrainConfig
from moescope.training.metrics import flops_per_token
from moescope.training.objective import BalanceRecorder, compute_losses
from moescope.training.optimizer import Optimizer

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "moe.toml"
STEPS_A_ROUND = 3


def ours(config: TrainConfig, optimizer_kind: str, ids: Tensor) -> Callable[[], None]:
    """A training step of moescope on `(batch, seq + 1)` ids, as `training.learner` takes it."""
    model = CausalLM(config.model)
    initialise(model, 0)
    model.to(ids.device)
    optimizer = Optimizer(model, optimizer_kind, weight_decay=0.1)  # pyright: ignore
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()

    def step() -> None:
        for part in ids.split(config.training.rows_at_a_time):
            recorder = BalanceRecorder(config.model, config.balance, rows=len(part), l1_weight=0.0)
            losses = compute_losses(model, part, recorder, 0.0)
            losses.total.backward()
            optimizer.accumulate()
        optimizer.step(1e-3, 1e-3, 1.0)

    return step


def theirs(config: TrainConfig, ids: Tensor) -> Callable[[], None]:
    """The same step with `transformers`: float32 weights, bf16 autocast, fused AdamW."""
    fields = config_fields(config.model)
    fields.pop("architectures")
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**fields))
    model.set_experts_implementation("grouped_mm")
    model.to(ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        for part in ids.split(config.training.rows_at_a_time):
            with torch.autocast(ids.device.type, dtype=torch.bfloat16):
                loss = model(input_ids=part[:, :-1], labels=part[:, :-1], use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda")
    arguments = parser.parse_args()
    try:
        device = choose_device(arguments.device)
    except UserError as error:
        parser.error(str(error))

    keep_freed_memory()
    if not kernels.enable_fusion():
        print("no C++ compiler here: elementwise chains run unfused")
    config = TrainConfig.from_file(arguments.config, {})
    torch.manual_seed(0)
    rows, seq = config.training.batch_size, config.data.sequence_length
    ids = torch.randint(config.model.vocab_size, (rows, seq + 1)).to(device)
    tokens = rows * seq
    flops = flops_per_token(without_numbers(config.model), seq)

    sides = {
        "moescope, Muon": ours(config, "muon", ids),
        "moescope, AdamW": ours(config, "adamw", ids),
        "transformers, AdamW": theirs(config, ids),
    }
    for step in sides.values():  # compilation, and oneDNN's kernels for each size
        step()
        step()
    peaks: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        peaks.append(measure_gemm_peak(device=device))
        for name, step in sides.items():
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates[name].append(STEPS_A_ROUND * tokens / (time.perf_counter() - start))
    report(peaks, rates, flops, arguments.json)


def report(
    peaks: list[float], rates: dict[str, list[float]], flops: float, path: Path | None
) -> None:
    """Print medians with their spread; write every round to `path`."""
    table = Table(title=f"training, {flops / 1e6:.1f} MFLOP a token, {len(peaks)} rounds")
    for column in ("", "tokens/s", "min - max", "of the GEMM peak", "x transformers"):
        table.add_column(column, justify="right" if column else "left")
    baseline = rates["transformers, AdamW"]
    result: dict[str, object] = {"gemm_peak": peaks, "flops_per_token": flops, "rates": rates}
    ratios: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name, values in rates.items():
        shares[name] = statistics.median(v * flops / p for v, p in zip(values, peaks, strict=True))
        ratios[name] = statistics.median(v / b for v, b in zip(values, baseline, strict=True))
        table.add_row(
            name,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f} - {max(values):,.0f}",
            f"{shares[name]:.0%}",
            f"{ratios[name]:.2f}",
        )
    Console().print(table)
    print(f"bf16 GEMM peak: median {statistics.median(peaks) / 1e9:,.0f} GFLOP/s")
    if path is not None:
        path.write_text(json.dumps({**result, "share_of_peak": shares, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
