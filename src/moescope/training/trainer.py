"""The training loop: batches in, steps, evaluations and checkpoints, and finished weights out."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from moescope import kernels
from moescope.checkpoint import save_weights
from moescope.errors import UserError
from moescope.families import others_route_alike
from moescope.files import write_text
from moescope.machine import measure_gemm_peak
from moescope.model.balancing import AdaptiveL1
from moescope.model.decoder import CausalLM, initialise
from moescope.training.allocator import keep_freed_memory
from moescope.training.config import TrainConfig
from moescope.training.interruption import Interruption
from moescope.training.kind import Kind, Part
from moescope.training.kinds import make_kind
from moescope.training.metrics import (
    MetricsLog,
    TrainingDisplay,
    flops_per_token,
    print_line,
)
from moescope.training.objective import BalanceRecorder, count_choices
from moescope.training.optimizer import Optimizer
from moescope.training.pretraining import times
from moescope.training.rescue import lacking_room, save_somewhere
from moescope.training.schedule import warmup_stable_decay
from moescope.training.start import READING, load_start, reading_of
from moescope.training.state import (
    checkpoint_path,
    prune_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
    saved_steps,
)
from moescope.training.step_load import StepLoad
from moescope.training.text import with_special_ids
from moescope.training.watch import MAX_SKIPPED, Watch, way_back

LOAD_EVERY = 10
"""Steps between two whose load per expert is logged."""
SLOWER = 1.5
"""Times that bf16 products are slower than float32 ones, above which it is said."""
BYTES_OF_STATE = 12
"""Of a checkpoint a parameter: a float32 master and one or two moments."""
MAY_CHANGE = {
    "training.muon_learning_rate",
    "training.adamw_learning_rate",
    "training.clip",
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
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any] | None:
    """Train as `config` says, into the folder `out`.

    Ctrl-C or SIGTERM end the training after the step at hand, with a checkpoint; a second Ctrl-C
    ends the process at once. With `resume`, the last checkpoint in `out` is continued, bit for
    bit on the same machine and number of threads. With more steps than before it is the last one
    from before the learning rate decayed.

    Args:
        config: what to train.
        out: receives the model as `transformers` reads it, `training.json`, `metrics.jsonl`,
            `expert_load.json` and `.jsonl`, `trained_text.json` (what was held out),
            `tensorboard/`, `checkpoints/` and the token files.
        resume: continue what is in `out`; without a checkpoint there, begin.
        from_step: go back to the checkpoint of this step and continue from there.
        stream: where progress is shown; standard output if left out.

    Returns:
        What `training.json` holds, or None if the training was interrupted.

    Raises:
        UserError: no text, a text or vocabulary that does not fit, a folder that holds another
            training, a checkpoint that does not fit the config, a disk without room for the
            finished model, or gradients that are no longer numbers, step after step.
    """
    resume = resume or from_step is not None
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
    kind = make_kind(config, out, lambda line: print_line(console, line))
    model = with_special_ids(config.model, kind.tokenizer)
    config = config.model_copy(update={"model": model})
    trainer = Trainer(config, out, kind, begins=not steps)
    if steps:
        for note in trainer.resume(from_step):
            print_line(console, note)
    elif from_step is not None:
        raise UserError(f"there is no checkpoint in {out}, of step {from_step} or any other")
    elif resume:
        print_line(console, f"there is no checkpoint in {out} yet; beginning")
    return trainer.run(console)


class Trainer:
    """A network in training and everything that moves with it from step to step."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        kind: Kind[Any],
        *,
        begins: bool = True,
    ) -> None:
        """With `begins`, the weights are drawn, or taken from `[start]`; else `resume` follows."""
        training = config.training
        keep_freed_memory()
        if training.fuse:
            kernels.enable_fusion()
        torch.manual_seed(training.seed)
        self.config, self.out, self.kind, self.device = config, out, kind, kind.device
        length = config.data.sequence_length
        if config.kind != "pretrain":  # chats and answers are as long as they are
            length = config.model.trained_length
        self.model = CausalLM(config.model.model_copy(update={"trained_length": length}))
        if config.start.model is None:
            initialise(self.model, training.seed)
        elif begins:
            load_start(self.model, config.start.model)
        self.model.to(self.device)
        self.optimizer = Optimizer(
            self.model, training.optimizer, weight_decay=training.weight_decay
        )
        if training.dtype == "bfloat16":
            _round_parameters(self.model, torch.bfloat16)
        self.l1 = AdaptiveL1(config.balance.l1_start, config.balance.l1_factor)
        self.step = self.tokens_before = 0
        self.seconds = 0.0
        if config.start.model is not None and begins:
            self._keep_reading(config.start.model)
        self.warmup_steps = round(training.warmup_fraction * training.steps)
        self.watch = Watch(config.model.vocab_size, self.warmup_steps)

    def _keep_reading(self, start: str) -> None:
        """Go on where the training of the model started from had come to."""
        reading = reading_of(start)
        if reading is not None:
            self.tokens_before = reading["tokens"]
            if self.config.start.keep_reading:
                self.kind.keep_reading(reading["position"])

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, console: Console) -> dict[str, Any] | None:
        """Train to the last step and return the summary, or None if interrupted."""
        log = MetricsLog(self.out, self.step)
        peak = self._peak()
        display = TrainingDisplay(
            console,
            step=self.step,
            steps=self.config.training.steps,
            flops_per_token=flops_per_token(self.model, self.config.data.sequence_length),
            peak=peak,
        )
        try:
            with Interruption() as interruption, display:
                if not log.has_tensorboard:
                    display.say("tensorboard is not installed; metrics go to metrics.jsonl only")
                for note in self._notes(peak):
                    display.say(note)
                return self._run(log, display, interruption)
        finally:
            log.close()

    def _run(
        self, log: MetricsLog, display: TrainingDisplay, interruption: Interruption
    ) -> dict[str, Any] | None:
        steps, every = self.config.training.steps, self.config.evaluation.every
        while self.step < steps:
            before = self.kind.tokens
            row = self._logged_step()
            read = self.kind.tokens - before
            if (problem := row.pop("problem", None)) is not None:
                display.say(f"step {self.step} is skipped, no weight was moved: {problem}")
            if every and (self.step % every == 0 or self.step == steps):
                row |= self.evaluate(display.say)
                display.say(f"step {self.step}: {self.kind.sentence(row)}")
            if (problem := log.write(row)) is not None:
                display.say(problem)
            if row["loss"] is not None:
                display.update(self.step, row["loss"], read, row["seconds"])
            if (news := self.watch.news()) is not None:
                display.say(f"{news}; {self._way_back()}")
            if interruption.requested and self.step < steps:
                if (path := self._try_to_save(display.say)) is not None:
                    display.say(f"stopped at step {self.step}; continue with --resume from {path}")
                    return None
                display.say("the training goes on; stop it again when there is room")
                interruption.wait_again()
            elif self._is_checkpoint_due():
                self._try_to_save(display.say)
        summary = self._finish(display.say)
        if "epochs" in summary:
            display.say(f"read: {times(summary['epochs'])}")
        if (verdict := self.watch.verdict()) is not None:
            display.say(f"this training failed: {verdict}; {self._way_back()}")
        found = self.kind.sentence(summary)
        display.say(f"step {self.step}: {found}; the model is in {self.out}")
        return summary

    def _notes(self, peak: float | None) -> list[str]:
        """What a user should know before the first step."""
        training, config = self.config.training, self.config.model
        notes = self.kind.notes(training.steps)
        if self.config.start.model is not None:
            notes.append(f"starting from the weights of {self.config.start.model}")
        if config.topk_method in ("expert_choice", "sinkhorn"):
            tokens = training.rows_at_a_time * self.config.data.sequence_length
            notes.append(
                f"{config.topk_method}: the {tokens:,} tokens of a micro batch compete for "
                f"experts, so micro_batch_size {training.rows_at_a_time} is part of this recipe"
            )
        if not others_route_alike(config):
            notes.append(
                f"only moescope computes a {config.model_type} with the router "
                f"{config.topk_method} and {config.scoring_func} scores: the model is written "
                "so that others refuse it"
            )
        if self._counts_first:
            notes.append(
                "balance losses count over the whole step, so each micro batch is run forward "
                "twice; a larger micro_batch_size is faster and gives the same"
            )
        if peak is not None and training.dtype == "bfloat16":
            times = measure_gemm_peak(torch.float32) / peak
            if times > SLOWER:
                notes.append(
                    f"this processor multiplies float32 {times:.0f} times as fast as bfloat16; "
                    'dtype = "float32" in [training] makes the training faster'
                )
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        state = parameters * BYTES_OF_STATE
        kept = self.config.checkpoints.keep + 2 if self.config.checkpoints.every else 1
        if (warning := lacking_room(self.out, state * kept)) is not None:
            notes.append(warning)
        return notes

    def _way_back(self) -> str:
        training = self.config.training
        saved = saved_steps(self.out / "checkpoints")
        return way_back(saved, training.muon_learning_rate, training.adamw_learning_rate)

    def _try_to_save(self, say: Callable[[str], None]) -> Path | None:
        """Write a checkpoint; where the disk is full, say so and return None."""
        try:
            return self.save()
        except UserError as error:
            say(f"step {self.step}: {error}")
            return None

    def _logged_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        row = self.train_step()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {"step": self.step, **row, "tokens": self.kind.tokens, "seconds": seconds}

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoints.every
        if not every or self.watch.skipped:
            return False
        return self.step % every == 0 or self.step in (
            self._decay_start,
            self.config.training.steps,
        )

    def _peak(self) -> float | None:
        if self.device.type != "cpu" or self.config.kind == "rl":  # which mostly draws answers
            return None
        return measure_gemm_peak(getattr(torch, self.config.training.dtype))

    # --- one step ---------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; return what it showed.

        A batch whose gradient is not finite is skipped: no weight is moved, the row holds no loss
        but the problem.

        Raises:
            UserError: so many were skipped in a row that more of them would not help.
        """
        row: dict[str, Any] = {"loss": 0.0, "learning_rate_factor": self._learning_rate_factor()}
        for parts in self.kind.updates(self.model, self.step):
            row = self._move(parts)
            if "problem" in row:
                break
        self.step += 1
        if "problem" in row:
            self._count_skipped(row["problem"])
            return row
        self.watch.add(self.step, row["loss"])
        return row | self.kind.row()

    def _move(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Move the weights once; return what it showed, or the problem for which it was not."""
        config, training = self.config, self.config.training
        whole = None
        if self._counts_first:
            depths = self.model.mtp is not None and training.mtp_loss_weight > 0
            whole = count_choices(self.model, [part.ids for part in parts], with_depths=depths)
        load = StepLoad(config.model)
        sums = dict.fromkeys(("loss", "further_tokens_loss", "balance_loss"), 0.0)
        for part in parts:
            recorder = BalanceRecorder(
                config.model,
                config.balance,
                rows=len(part.ids),
                l1_weight=self.l1.weight,
                whole=whole,
                read=part.read,
            )
            losses = self.kind.losses(self.model, part, recorder)
            (losses.total * part.share).backward()
            self.optimizer.accumulate()
            sums["loss"] += float(losses.next_token) * part.share
            sums["further_tokens_loss"] += float(losses.further_tokens) * part.share
            sums["balance_loss"] += float(losses.balance) * part.share
            tokens = part.ids[:, 1:].numel() if part.read is None else int(part.read.sum())
            load.add(recorder, part.share, rows=len(part.ids), tokens=tokens)
        factor = self._learning_rate_factor()
        try:
            norm = self.optimizer.step(
                training.muon_learning_rate * factor,
                training.adamw_learning_rate * factor,
                training.clip,
            )
        except FloatingPointError as error:
            problem = f"{error} and the loss {sums['loss']}"
            return {"loss": None, "learning_rate_factor": factor, "problem": problem}
        load.move(self.model, self.l1, config.balance.bias_update_speed)
        row: dict[str, Any] = {**sums, "gradient_norm": norm, "learning_rate_factor": factor}
        row |= load.row(with_loads=(self.step + 1) % LOAD_EVERY == 0)
        if config.model.topk_method == "relu":
            row["l1_weight"] = self.l1.weight
        return row

    @property
    def _counts_first(self) -> bool:
        """Whether a balance loss depends on the load of micro batches that are yet to come."""
        config, balance = self.config, self.config.balance
        if config.training.rows_at_a_time == config.training.batch_size:
            return False
        if config.model.n_routed_experts is None:
            return False
        return bool(balance.expert_aux or balance.device_aux or config.model.topk_method == "relu")

    def _count_skipped(self, problem: str) -> None:
        """Count a step whose gradient was not finite.

        Raises:
            UserError: it is the last of too many in a row.
        """
        self.watch.skipped += 1
        if self.watch.skipped >= MAX_SKIPPED:
            raise UserError(
                f"steps {self.step - MAX_SKIPPED + 1} to {self.step} went wrong: {problem}; "
                f"{self._way_back()}"
            )

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

    # --- what comes out ---------------------------------------------------------------------------

    def evaluate(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Measure on what the training holds out."""
        return self.kind.evaluate(self.model, self.out, self.step, say)

    def _finish(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Write the finished model into `out`, as `transformers` reads it, with a summary.

        Raises:
            UserError: `out` has no room for it, and where it lies instead.
        """
        summary = {
            "step": self.step,
            "tokens": self.kind.tokens,
            "seconds": self.seconds,
            **self.evaluate(say),
            "failed": self.watch.verdict(),
            "config": _plain(self.config),
        }

        def save(folder: Path) -> None:
            save_weights(self.model, folder)
            self.kind.tokenizer.save(folder)
            if self.kind.remembered is not None:
                self.kind.remembered.save(folder)
            reading = {
                "tokens": self.tokens_before + self.kind.tokens,
                "position": self.kind.state_dict(),
            }
            write_text(folder / READING, json.dumps(reading) + "\n")
            text = json.dumps(summary, indent=2, ensure_ascii=False)
            write_text(folder / "training.json", text + "\n")

        save_somewhere(save, self.out, say)
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
            "tokens_before": self.tokens_before,
            "tokens": self.kind.tokens,
            "batches": self.kind.state_dict(),
            "config": _plain(self.config),
        }
        folder = self.out / "checkpoints"
        path = save_checkpoint(folder, self.step, tensors, state)
        if self.watch.is_failing:
            return path  # those from before it failed are the way back
        past = [step for step in saved_steps(folder) if step <= self.step]
        keep = past[-self.config.checkpoints.keep :]
        prune_checkpoints(folder, {*keep, self._decay_start})
        return path

    def resume(self, from_step: int | None = None) -> list[str]:
        """Continue from the last checkpoint that fits; return what the user should know.

        Args:
            from_step: go back to the checkpoint of this step instead.

        Raises:
            UserError: it is damaged, or was made with a config that differs where it may not, or
                the learning rate had decayed already in all checkpoints and steps are added.
        """
        path, state = self._last_fitting_checkpoint(from_step)
        notes = [f"continuing from {path}", *self._check_same_config(state["config"], path)]
        tensors = read_tensors(path)
        self.optimizer.load_state_tensors(tensors)
        with torch.no_grad():
            for name, tensor in self._untrained_tensors().items():
                tensor.copy_(tensors[name])
        torch.set_rng_state(tensors["rng"])
        self.kind.load_state_dict(state["batches"])
        self.step, self.seconds = state["step"], state["seconds"]
        training = self.config.training  # older checkpoints do not say how much was read
        per_step = training.batch_size * self.config.data.sequence_length
        self.kind.tokens = state.get("tokens", self.step * per_step)
        self.tokens_before = state.get("tokens_before", 0)
        self.warmup_steps, self.l1.weight = state["warmup_steps"], state["l1_weight"]
        self.watch = Watch(self.config.model.vocab_size, self.warmup_steps)
        threads = torch.get_num_threads()
        if state.get("threads", threads) != threads:
            notes.append(
                f"the checkpoint was made with {state['threads']} threads, this process has "
                f"{threads}: the last bits of the results may differ"
            )
        return notes

    def _last_fitting_checkpoint(self, wanted: int | None) -> tuple[Path, dict[str, Any]]:
        folder, training = self.out / "checkpoints", self.config.training
        saved = saved_steps(folder)
        if wanted is not None and wanted not in saved:
            there = ", ".join(map(str, saved))
            raise UserError(f"there is no checkpoint of step {wanted} in {folder}; it has {there}")
        for step in reversed(saved) if wanted is None else [wanted]:
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

    def _check_same_config(self, saved: dict[str, Any], checkpoint: Path) -> list[str]:
        """Refuse a config that differs where it may not; say where its rates differ."""
        notes: list[str] = []
        ours, theirs = _plain(self.config), _plain(TrainConfig.model_validate(saved))
        if ours.pop("kind") != theirs.pop("kind"):
            raise UserError(
                f"{checkpoint} is of another kind of training than {self.config.kind!r}; start a "
                "new training in another folder"
            )
        for table, fields in ours.items():
            for field, now in fields.items():
                name, before = f"{table}.{field}", theirs[table][field]
                if before != now and name not in MAY_CHANGE:
                    raise UserError(
                        f"{checkpoint} was made with {name} = {before!r}, the config now says "
                        f"{now!r}; set it back or start a new training in another folder"
                    )
                if before != now and name.endswith(("learning_rate", "clip")):
                    notes.append(f"{name} was {before!r} and is {now!r} from here on")
        return notes


def _round_parameters(model: CausalLM, dtype: torch.dtype) -> None:
    """Convert the parameters only: biases of routers and rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
