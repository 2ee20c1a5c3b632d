"""Pretraining: every token of packed text is predicted from those before it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moescope.errors import UserError
from moescope.files import write_text
from moescope.model.decoder import CausalLM
from moescope.text.split import TrainedText
from moescope.training.batches import PackedBatches
from moescope.training.config import TrainConfig
from moescope.training.evaluation import Evaluation, evaluate
from moescope.training.kind import Say
from moescope.training.metrics import rows_up_to
from moescope.training.objective import BalanceRecorder, Losses, compute_losses
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part
from moescope.training.text import TrainingText


class Pretraining:
    """`kind = "pretrain"`."""

    evaluates_first = False

    def __init__(
        self, config: TrainConfig, text: TrainingText, device: torch.device, ranks: Ranks
    ) -> None:
        self.tokenizer, self.tokens = text.tokenizer, 0
        self.remembered: TrainedText | None = text.remembered
        self._config, self._held_out, self.device = config, text.held_out, device
        self._ranks = ranks
        self.batches = PackedBatches(
            text.train,
            batch_size=config.training.batch_size,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            domain_weights=config.data.domain_weights,
        )

    def updates(self, model: CausalLM, step: int) -> Iterator[Sequence[Part]]:
        training = self._config.training
        ids, _ = self.batches.next()  # (batch, seq + 1)
        self.tokens += training.batch_size * self._config.data.sequence_length
        parts = ids.to(self.device).split(training.rows_at_a_time)
        yield [Part(ids=part, share=1 / len(parts)) for part in parts]

    def losses(self, model: CausalLM, part: Part, recorder: BalanceRecorder) -> Losses:
        return compute_losses(model, part.ids, recorder, self._config.training.mtp_loss_weight)

    def row(self) -> dict[str, Any]:
        return {}

    def evaluate(self, model: CausalLM, out: Path, step: int, say: Say) -> dict[str, Any]:
        """Measure on held-out text; keep the load per domain, layer and expert in two files.

        `expert_load.json` holds the latest, `expert_load.jsonl` a line for each step.
        """
        result = evaluate(
            model,
            self._held_out,
            batch_size=self._config.training.rows_at_a_time,
            sequence_length=self._config.data.sequence_length,
            max_tokens=self._config.evaluation.tokens,
            ranks=self._ranks,
        )
        if self._ranks.is_first:
            self._keep_load(result, out, step, say)
        return {**result.to_row(), "epochs": self.batches.epochs()}

    def _keep_load(self, result: Evaluation, out: Path, step: int, say: Say) -> None:
        load = {"step": step, "load": result.load}
        line = json.dumps(load, ensure_ascii=False) + "\n"
        series = out / "expert_load.jsonl"
        try:
            write_text(out / "expert_load.json", line)
            write_text(series, "".join([*rows_up_to(series, step - 1), line]))
        except UserError as error:
            say(f"step {step}: {error}")

    def sentence(self, row: dict[str, Any]) -> str:
        return loss_sentence(row)

    def notes(self, steps: int) -> list[str]:
        return [f"{steps:,} steps read {times(self.batches.planned_epochs(steps))}"]

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def keep_reading(self, state: dict[str, Any]) -> None:
        self.batches.read_on(state)


def loss_sentence(row: dict[str, Any]) -> str:
    losses: dict[str, float] = row["held_out_loss"]
    parts = ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
    return f"held-out loss {parts or 'unknown (no held-out text)'}"


def times(epochs: dict[str, float]) -> str:
    return ", ".join(f"{domain} {times:.2g} times" for domain, times in epochs.items())
