"""The training loop: batches in, steps, evaluations and checkpoints, and finished weights out."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from moescope import kernels
from moescope.errors import UserError
from moescope.files import write_text
from moescope.machine import measure_gemm_peak
from moescope.model.balancing import AdaptiveL1, max_violation, update_bias
from moescope.model.decoder import CausalLM, initialise
from moescope.model.moe import MoE
from moescope.model.routing import NoAuxTopK
from moescope.tokenizer import Tokenizer
from moescope.training.allocator import keep_freed_memory
from moescope.training.config import TrainConfig
from moescope.training.data import PackedBatches, ShardIndex, build_shards
from moescope.training.evaluation import evaluate
from moescope.training.metrics import MetricsLog, TrainingDisplay, flops_per_token
from moescope.training.objective import BalanceRecorder, compute_losses
from moescope.training.optimizer import Optimizer
from moescope.training.schedule import warmup_stable_decay
from moescope.training.state import list_checkpoints, load_checkpoint, save_checkpoint

MAY_CHANGE = {
    "training.steps",
    "training.warmup_fraction",
    "training.decay_fraction",
    "training.decay",
    "data.source",
    "data.tokenizer",
    "evaluation.every",
    "evaluation.tokens",
    "checkpoints.every",
    "checkpoints.keep",
}
"""Fields that a resumed training may give anew; the text itself is told by its own key."""


def train(config: TrainConfig, out: Path, *, resume: bool, say: Callable[[str], None]) -> bool:
    """Train as `config` says, into the folder `out`; return whether all steps were done.

    Ctrl-C or SIGTERM end it after the step at hand, with a checkpoint; then the result is False.

    Raises:
        UserError: no text, a text or vocabulary that does not fit, a folder that holds another
            training, a checkpoint that does not fit the config, a full disk, or a loss that is
            no longer a number.
    """
    checkpoints = list_checkpoints(out / "checkpoints")
    if checkpoints and not resume:
        raise UserError(
            f"{out} already holds a training ({checkpoints[-1].name}); continue it with --resume "
            "or choose another folder"
        )
    tokenizer, train_index, held_out_index = _prepare_text(config, out)
    trainer = Trainer(config, out, tokenizer, train_index, held_out_index)
    if checkpoints:
        trainer.load(checkpoints[-1])
        say(f"continuing from {checkpoints[-1]}")
    return trainer.run(say)


class Trainer:
    """A network in training and everything that moves with it from step to step."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        tokenizer: Tokenizer,
        train_index: ShardIndex,
        held_out_index: ShardIndex,
    ) -> None:
        keep_freed_memory()
        training = config.training
        if training.fuse:
            kernels.enable_fusion()
        torch.manual_seed(training.seed)
        self.config, self.out = config, out
        self.tokenizer = tokenizer
        self.held_out_index = held_out_index
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = CausalLM(config.model)
        initialise(self.model, training.seed)
        self.model.to(self.device)
        self.optimizer = Optimizer(
            self.model, training.optimizer, weight_decay=training.weight_decay
        )
        if training.dtype == "bfloat16":
            _round_parameters(self.model, torch.bfloat16)
        self.batches = PackedBatches(
            train_index,
            batch_size=training.batch_size,
            sequence_length=config.data.sequence_length,
            seed=training.seed,
            domain_weights=config.data.domain_weights,
        )
        self.l1 = AdaptiveL1(config.balance.l1_start, config.balance.l1_factor)
        self.step = 0
        self.seconds = 0.0
        self.warmup_steps = round(training.warmup_fraction * training.steps)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.sequence_length

    def run(self, say: Callable[[str], None]) -> bool:
        """Train to the last step, or until interrupted; return whether it was the last."""
        config, steps = self.config, self.config.training.steps
        log = MetricsLog(self.out, self.step)
        if not log.has_tensorboard:
            say("tensorboard is not installed; metrics go to metrics.jsonl only")
        display = TrainingDisplay(
            self.step, steps, flops_per_token(self.model, config.data.sequence_length), self._peak()
        )
        with _Interruption() as interruption, display:
            while self.step < steps and not interruption.requested:
                row = self._timed_step()
                if config.evaluation.every and self.step % config.evaluation.every == 0:
                    row |= self._evaluate()
                    display.say(_sentence(self.step, row["held_out_loss"]))
                log.write(row)
                display.update(self.step, row["loss"], self.tokens_per_step, row["seconds"])
                every = config.checkpoints.every
                if every and self.step % every == 0 and self.step < steps:
                    self.save()
            if interruption.requested or config.checkpoints.every or self.step < steps:
                path = self.save()
                if self.step < steps:
                    display.say(f"stopped at step {self.step}; saved {path}, continue with --resume")
        if self.step >= steps:
            self._finish(log, say)
        log.close()
        return self.step >= steps

    def _timed_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        row = self.train_step()
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        return {"step": self.step, **row, "tokens": self.step * self.tokens_per_step,
                "seconds": elapsed}

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; return what it showed.

        Raises:
            UserError: loss or gradient is no finite number; the weights were not moved.
        """
        config, training = self.config, self.config.training
        ids, _ = self.batches.next()
        parts = ids.to(self.device).split(training.rows_at_a_time)
        counts: dict[int, Tensor] = {}
        sums = dict.fromkeys(("loss", "further_tokens_loss", "balance_loss"), 0.0)
        for part in parts:
            recorder = BalanceRecorder(
                config.model,
                config.balance,
                seq=config.data.sequence_length,
                l1_weight=self.l1.weight,
            )
            losses = compute_losses(self.model, part, recorder, training.mtp_loss_weight)
            (losses.total / len(parts)).backward()
            self.optimizer.accumulate()
            sums["loss"] += float(losses.next_token) / len(parts)
            sums["further_tokens_loss"] += float(losses.further_tokens) / len(parts)
            sums["balance_loss"] += float(losses.balance) / len(parts)
            for layer, received in recorder.counts.items():
                counts[layer] = counts.get(layer, torch.zeros_like(received)) + received
        factor = self._learning_rate_factor()
        try:
            norm = self.optimizer.step(
                training.muon_learning_rate * factor,
                training.adamw_learning_rate * factor,
                training.clip,
            )
        except FloatingPointError as error:
            raise UserError(
                f"step {self.step + 1} went wrong: {error} and the loss {sums['loss']}; lower the "
                "learning rates and continue from the last checkpoint, which is untouched"
            ) from error
        self._rebalance(counts)
        self.step += 1
        row: dict[str, Any] = {**sums, "gradient_norm": norm, "learning_rate_factor": factor}
        if counts:
            row["max_violation"] = {
                str(layer): float(max_violation(c)) for layer, c in counts.items()
            }
        if config.model.topk_method == "relu":
            row["l1_weight"] = self.l1.weight
        return row

    def _learning_rate_factor(self) -> float:
        training = self.config.training
        return warmup_stable_decay(
            self.step,
            steps=training.steps,
            warmup_steps=self.warmup_steps,
            decay_steps=round(training.decay_fraction * training.steps),
            decay=training.decay,
        )

    def _rebalance(self, counts: dict[int, Tensor]) -> None:
        """Move the loss-free biases and the L1 weight by the step's load."""
        top_k = self.config.model.num_experts_per_tok
        for layer, received in counts.items():
            mlp = self.model.model.layers[layer].mlp
            assert isinstance(mlp, MoE)
            if isinstance(mlp.gate, NoAuxTopK):
                speed = self.config.balance.bias_update_speed
                update_bias(mlp.gate.e_score_correction_bias, received, speed)
        if counts and top_k is not None:
            chosen = torch.stack(list(counts.values())).sum(dim=1).float().mean()
            self.l1.update(float(chosen) / self.tokens_per_step, top_k)

    def _evaluate(self) -> dict[str, Any]:
        result = evaluate(
            self.model,
            self.held_out_index,
            batch_size=self.config.training.rows_at_a_time,
            sequence_length=self.config.data.sequence_length,
            max_tokens=self.config.evaluation.tokens,
        )
        load = {"step": self.step, "load": result.load}
        write_text(self.out / "specialization.json", json.dumps(load, ensure_ascii=False) + "\n")
        return result.to_row()

    def _finish(self, log: MetricsLog, say: Callable[[str], None]) -> None:
        """Write the finished model into `out`, as `transformers` reads it, with a summary."""
        from moescope.checkpoint import save_weights

        measured = self._evaluate()
        save_weights(self.model, self.out)
        self.tokenizer.save(self.out)
        summary = {
            "steps": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            **measured,
            "config": _plain(self.config),
        }
        write_text(
            self.out / "training.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        )
        say(_sentence(self.step, measured["held_out_loss"]))
        say(f"the model is in {self.out}")

    def _peak(self) -> float | None:
        if self.device.type != "cpu":
            return None
        return measure_gemm_peak(getattr(torch, self.config.training.dtype))

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this very moment; return its folder."""
        tensors = {**self.optimizer.state_tensors(), **self._model_tensors()}
        tensors["rng"] = torch.get_rng_state()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warmup_steps": self.warmup_steps,
            "l1_weight": self.l1.weight,
            "batches": self.batches.state_dict(),
            "config": _plain(self.config),
        }
        folder = self.out / "checkpoints"
        return save_checkpoint(folder, self.step, tensors, state, self.config.checkpoints.keep)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is damaged, or was made with a config that differs where it may not.
        """
        tensors, state = load_checkpoint(checkpoint)
        self._check_same_config(state["config"], checkpoint)
        self.optimizer.load_state_tensors(tensors)
        with torch.no_grad():
            for name, tensor in self._model_tensors().items():
                tensor.copy_(tensors[name])
        torch.set_rng_state(tensors["rng"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.warmup_steps, self.l1.weight = state["warmup_steps"], state["l1_weight"]

    def _model_tensors(self) -> dict[str, Tensor]:
        """What the network holds beside trained weights: biases and frozen weights."""
        trained = self.optimizer.masters
        return {
            f"model.{name}": tensor
            for name, tensor in self.model.state_dict().items()
            if name not in trained and name != "lm_head.weight"
        } if self.config.model.tie_word_embeddings else {
            f"model.{name}": tensor
            for name, tensor in self.model.state_dict().items()
            if name not in trained
        }

    def _check_same_config(self, saved: dict[str, Any], checkpoint: Path) -> None:
        ours = _plain(self.config)
        for table, fields in ours.items():
            for field in {**saved.get(table, {}), **fields}:
                name = f"{table}.{field}"
                before, now = saved.get(table, {}).get(field), fields.get(field)
                if before != now and name not in MAY_CHANGE:
                    raise UserError(
                        f"{checkpoint} was trained with {name} = {before!r}, the config now says "
                        f"{now!r}; set it back or start a new training in another folder"
                    )


class _Interruption:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_Interruption":
        self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)


def _prepare_text(config: TrainConfig, out: Path) -> tuple[Tokenizer, ShardIndex, ShardIndex]:
    source = config.data.source
    if source is None:
        raise UserError("the config names no text; give --data FOLDER or `source` in [data]")
    tokenizer = _open_tokenizer(config, source, out / "tokenizer")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is "
            f"{config.model.vocab_size}; raise vocab_size in [model] or choose a smaller tokenizer"
        )
    shards = out / "shards"
    return (
        tokenizer,
        build_shards(source, shards, tokenizer),
        build_shards(source, shards, tokenizer, held_out=True),
    )


def _open_tokenizer(config: TrainConfig, source: Path, folder: Path) -> Tokenizer:
    if config.data.tokenizer is not None:
        return Tokenizer.load(config.data.tokenizer)
    if not (folder / "tokenizer.json").exists():
        Tokenizer.train(source, config.model.vocab_size, progress=False).save(folder)
    return Tokenizer.load(folder)


def _round_parameters(model: CausalLM, dtype: torch.dtype) -> None:
    """Convert the parameters only: biases of routers and rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _sentence(step: int, held_out_loss: dict[str, float]) -> str:
    parts = ", ".join(f"{domain} {loss:.4f}" for domain, loss in held_out_loss.items())
    return f"step {step}, held-out loss: {parts or 'no held-out text'}"
