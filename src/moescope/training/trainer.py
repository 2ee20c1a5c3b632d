"""The training loop: batches in, steps, evaluations and checkpoints, and finished weights out."""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from moescope import kernels
from moescope.checkpoint import save_weights
from moescope.errors import UserError
from moescope.files import write_text
from moescope.machine import measure_gemm_peak
from moescope.model.balancing import AdaptiveL1, max_violation, update_bias
from moescope.model.decoder import CausalLM, initialise
from moescope.model.moe import MoE
from moescope.model.routing import NoAuxTopK
from moescope.training.allocator import keep_freed_memory
from moescope.training.batches import PackedBatches
from moescope.training.config import TrainConfig
from moescope.training.evaluation import evaluate
from moescope.training.metrics import (
    MetricsLog,
    TrainingDisplay,
    flops_per_token,
    print_line,
    rows_up_to,
)
from moescope.training.objective import BalanceRecorder, compute_losses
from moescope.training.optimizer import Optimizer
from moescope.training.schedule import warmup_stable_decay
from moescope.training.state import (
    checkpoint_path,
    prune_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
    saved_steps,
)
from moescope.training.text import TrainingText, prepare_text, with_special_ids

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
"""Fields that a resumed training may give anew; other text is told by the batches' own key."""


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, stream: TextIO | None = None
) -> dict[str, Any] | None:
    """Train as `config` says, into the folder `out`.

    Ctrl-C or SIGTERM end the training after the step at hand, with a checkpoint; a second Ctrl-C
    ends the process at once. With `resume`, the last checkpoint in `out` is continued, bit for
    bit on the same machine and number of threads. With more steps than before it is the last one
    from before the learning rate decayed.

    Args:
        config: what to train.
        out: receives the model as `transformers` reads it, `training.json`, `metrics.jsonl`,
            `expert_load.json` and `.jsonl`, `tensorboard/`, `checkpoints/` and the token files.
        resume: continue what is in `out`; without a checkpoint there, begin.
        stream: where progress is shown; standard output if left out.

    Returns:
        What `training.json` holds, or None if the training was interrupted.

    Raises:
        UserError: no text, a text or vocabulary that does not fit, a folder that holds another
            training, a checkpoint that does not fit the config, a full disk, or a loss that is
            no longer a number.
    """
    console = Console(file=stream or sys.stdout)
    steps = saved_steps(out / "checkpoints")
    if steps and not resume:
        raise UserError(
            f"{out} already holds a training ({steps[-1]} steps of it are saved); continue it with "
            "--resume or choose another folder"
        )
    if not steps and (out / "config.json").exists():
        raise UserError(
            f"{out} already holds a model, and no checkpoint to continue it from; choose another "
            "folder"
        )
    text = prepare_text(config.data, config.model, out, lambda line: print_line(console, line))
    model = with_special_ids(config.model, text.tokenizer)
    trainer = Trainer(config.model_copy(update={"model": model}), out, text)
    if steps:
        for note in trainer.resume():
            print_line(console, note)
    elif resume:
        print_line(console, f"there is no checkpoint in {out} yet; beginning")
    return trainer.run(console)


class Trainer:
    """A network in training and everything that moves with it from step to step."""

    def __init__(self, config: TrainConfig, out: Path, text: TrainingText) -> None:
        training = config.training
        keep_freed_memory()
        if training.fuse:
            kernels.enable_fusion()
        torch.manual_seed(training.seed)
        self.config, self.out, self.text = config, out, text
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        length = config.data.sequence_length
        self.model = CausalLM(config.model.model_copy(update={"trained_length": length}))
        initialise(self.model, training.seed)
        self.model.to(self.device)
        self.optimizer = Optimizer(
            self.model, training.optimizer, weight_decay=training.weight_decay
        )
        if training.dtype == "bfloat16":
            _round_parameters(self.model, torch.bfloat16)
        self.batches = PackedBatches(
            text.train,
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

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, console: Console) -> dict[str, Any] | None:
        """Train to the last step and return the summary, or None if interrupted."""
        log = MetricsLog(self.out, self.step)
        display = TrainingDisplay(
            console,
            step=self.step,
            steps=self.config.training.steps,
            flops_per_token=flops_per_token(self.model, self.config.data.sequence_length),
            peak=self._peak(),
        )
        try:
            with _Interruption() as interruption, display:
                if not log.has_tensorboard:
                    display.say("tensorboard is not installed; metrics go to metrics.jsonl only")
                return self._run(log, display, interruption)
        finally:
            log.close()

    def _run(
        self, log: MetricsLog, display: TrainingDisplay, interruption: "_Interruption"
    ) -> dict[str, Any] | None:
        steps, every = self.config.training.steps, self.config.evaluation.every
        while self.step < steps:
            row = self._logged_step()
            if every and (self.step % every == 0 or self.step == steps):
                row |= self.evaluate()
                display.say(_sentence(row))
            log.write(row)
            display.update(self.step, row["loss"], self.tokens_per_step, row["seconds"])
            if interruption.requested and self.step < steps:
                path = self.save()
                display.say(f"stopped at step {self.step}; continue with --resume from {path}")
                return None
            if self._is_checkpoint_due():
                self.save()
        summary = self._finish()
        display.say(f"{_sentence(summary)}; the model is in {self.out}")
        return summary

    def _logged_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        row = self.train_step()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        tokens = self.step * self.tokens_per_step
        return {"step": self.step, **row, "tokens": tokens, "seconds": seconds}

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoints.every
        if not every:
            return False
        return self.step % every == 0 or self.step in (
            self._decay_start,
            self.config.training.steps,
        )

    def _peak(self) -> float | None:
        if self.device.type != "cpu":
            return None
        return measure_gemm_peak(getattr(torch, self.config.training.dtype))

    # --- one step ---------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; return what it showed.

        Raises:
            UserError: the loss or the gradient is no finite number; no weight was moved.
        """
        config, training = self.config, self.config.training
        ids, _ = self.batches.next()  # (batch, seq + 1)
        parts = ids.to(self.device).split(training.rows_at_a_time)
        counts: dict[int, Tensor] = {}
        sums = dict.fromkeys(("loss", "further_tokens_loss", "balance_loss"), 0.0)
        for part in parts:
            recorder = BalanceRecorder(
                config.model,
                config.balance,
                rows=len(part),
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
                "learning rates and begin again, or continue with --resume from the last "
                "checkpoint, which is untouched"
            ) from error
        self._rebalance(counts)
        self.step += 1
        row: dict[str, Any] = {**sums, "gradient_norm": norm, "learning_rate_factor": factor}
        if counts:
            row["max_violation"] = {
                str(layer): float(max_violation(received)) for layer, received in counts.items()
            }
        if config.model.topk_method == "relu":
            row["l1_weight"] = self.l1.weight
        return row

    @property
    def _decay_start(self) -> int:
        training = self.config.training
        return training.steps - round(training.decay_fraction * training.steps)

    def _learning_rate_factor(self) -> float:
        training = self.config.training
        return warmup_stable_decay(
            self.step,
            steps=training.steps,
            warmup_steps=self.warmup_steps,
            decay_steps=training.steps - self._decay_start,
            decay=training.decay,
        )

    def _rebalance(self, counts: dict[int, Tensor]) -> None:
        """Move the loss-free biases and the L1 weight by the step's load."""
        for module in self.model.modules():
            if isinstance(module, MoE) and isinstance(module.gate, NoAuxTopK):
                received = counts.get(module.layer_idx)
                if received is not None:
                    speed = self.config.balance.bias_update_speed
                    update_bias(module.gate.e_score_correction_bias, received, speed)
        main = [c for layer, c in counts.items() if layer < self.config.model.num_hidden_layers]
        if main:
            chosen = torch.stack(main).sum(dim=1).float().mean()
            top_k = self.config.model.required("num_experts_per_tok")
            self.l1.update(float(chosen) / self.tokens_per_step, top_k)

    # --- what comes out ---------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Measure on held-out text; keep the load per domain, layer and expert in two files.

        `expert_load.json` holds the latest, `expert_load.jsonl` a line for each step.
        """
        result = evaluate(
            self.model,
            self.text.held_out,
            batch_size=self.config.training.rows_at_a_time,
            sequence_length=self.config.data.sequence_length,
            max_tokens=self.config.evaluation.tokens,
        )
        load = {"step": self.step, "load": result.load}
        line = json.dumps(load, ensure_ascii=False) + "\n"
        write_text(self.out / "expert_load.json", line)
        series = self.out / "expert_load.jsonl"
        write_text(series, "".join([*rows_up_to(series, self.step - 1), line]))
        return result.to_row()

    def _finish(self) -> dict[str, Any]:
        """Write the finished model into `out`, as `transformers` reads it, with a summary."""
        save_weights(self.model, self.out)
        self.text.tokenizer.save(self.out)
        summary = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            **self.evaluate(),
            "config": _plain(self.config),
        }
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        write_text(self.out / "training.json", text + "\n")
        return summary

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this very moment; return its folder.

        Besides the last few, the one from before the learning rate decayed is kept: more steps
        can continue from it. Those of later steps belong to a run that was wound back.
        """
        tensors = {**self.optimizer.state_tensors(), **self._untrained_tensors()}
        tensors["rng"] = torch.get_rng_state()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warmup_steps": self.warmup_steps,
            "l1_weight": self.l1.weight,
            "threads": torch.get_num_threads(),
            "batches": self.batches.state_dict(),
            "config": _plain(self.config),
        }
        folder = self.out / "checkpoints"
        path = save_checkpoint(folder, self.step, tensors, state)
        past = [step for step in saved_steps(folder) if step <= self.step]
        keep = past[-self.config.checkpoints.keep :]
        prune_checkpoints(folder, {*keep, self._decay_start})
        return path

    def resume(self) -> list[str]:
        """Continue from the last checkpoint that fits; return what the user should know.

        Raises:
            UserError: it is damaged, or was made with a config that differs where it may not, or
                the learning rate had decayed already in all checkpoints and steps are added.
        """
        path, state = self._last_fitting_checkpoint()
        self._check_same_config(state["config"], path)
        tensors = read_tensors(path)
        self.optimizer.load_state_tensors(tensors)
        with torch.no_grad():
            for name, tensor in self._untrained_tensors().items():
                tensor.copy_(tensors[name])
        torch.set_rng_state(tensors["rng"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.warmup_steps, self.l1.weight = state["warmup_steps"], state["l1_weight"]
        notes = [f"continuing from {path}"]
        threads = torch.get_num_threads()
        if state.get("threads", threads) != threads:
            notes.append(
                f"the checkpoint was made with {state['threads']} threads, this process has "
                f"{threads}: the last bits of the results may differ"
            )
        return notes

    def _last_fitting_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        folder, training = self.out / "checkpoints", self.config.training
        for step in reversed(saved_steps(folder)):
            path = checkpoint_path(folder, step)
            state = read_state(path)
            before: dict[str, Any] = state["config"]["training"]
            decay_start = before["steps"] - round(before["decay_fraction"] * before["steps"])
            if step <= training.steps and (
                training.steps == before["steps"] or step <= decay_start
            ):
                return path, state
        raise UserError(
            f"no checkpoint in {folder} can continue to {training.steps} steps: it must lie before "
            "that step and before the learning rate decayed; train anew in another folder"
        )

    def _untrained_tensors(self) -> dict[str, Tensor]:
        """What the network holds beside trained weights: routers' biases and frozen weights."""
        trained = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        tensors = self.model.state_dict(keep_vars=True)
        return {f"model.{n}": t.detach() for n, t in tensors.items() if t not in trained}

    def _check_same_config(self, saved: dict[str, Any], checkpoint: Path) -> None:
        ours, theirs = _plain(self.config), _plain(TrainConfig.model_validate(saved))
        for table, fields in ours.items():
            for field, now in fields.items():
                name, before = f"{table}.{field}", theirs[table][field]
                if before != now and name not in MAY_CHANGE:
                    raise UserError(
                        f"{checkpoint} was made with {name} = {before!r}, the config now says "
                        f"{now!r}; set it back or start a new training in another folder"
                    )


class _Interruption:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second ends at once."""

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


def _round_parameters(model: CausalLM, dtype: torch.dtype) -> None:
    """Convert the parameters only: biases of routers and rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _sentence(row: dict[str, Any]) -> str:
    losses: dict[str, float] = row["held_out_loss"]
    parts = ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
    return f"step {row['step']}: held-out loss {parts or 'unknown (no held-out text)'}"
