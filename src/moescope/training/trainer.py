"""The training loop: batches in, steps, evaluations and checkpoints, and finished weights out."""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from moescope import kernels
from moescope.checkpoint import save_weights
from moescope.errors import UserError
from moescope.files import write_text
from moescope.machine import choose_device, measure_gemm_peak
from moescope.model.decoder import CausalLM
from moescope.training.allocator import keep_freed_memory
from moescope.training.config import TrainConfig
from moescope.training.folder import claimed
from moescope.training.interruption import Interruption
from moescope.training.kind import Kind
from moescope.training.kinds import make_kind
from moescope.training.learner import Learner
from moescope.training.metrics import (
    MetricsLog,
    TrainingDisplay,
    flops_per_token,
    print_line,
)
from moescope.training.notes import notes_before
from moescope.training.parallel.placement import each_whole, let_go, whole_copy
from moescope.training.parallel.ranks import Ranks, joined, was_restarted
from moescope.training.parallel.saver import Saver, read_dealt
from moescope.training.pretraining import times
from moescope.training.rescue import save_somewhere
from moescope.training.resume import check_same_config, last_fitting_checkpoint, plain
from moescope.training.schedule import warmup_stable_decay
from moescope.training.start import READING, reading_of
from moescope.training.state import (
    checkpoint_path,
    is_dealt,
    prune_checkpoints,
    read_tensors,
    save_checkpoint,
    saved_steps,
)
from moescope.training.text import with_special_ids
from moescope.training.watch import MAX_SKIPPED, Watch, way_back


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any] | None:
    """Train as `config` says, into the folder `out`, alone or as one of torchrun's processes.

    Ctrl-C or SIGTERM end the training after the step at hand, with a checkpoint; a second Ctrl-C
    ends the process at once. With `resume`, the last checkpoint in `out` is continued, bit for
    bit on the same machine and number of threads. With more steps than before it is the last one
    from before the learning rate decayed. What torchrun has restarted is resumed, too.

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
            training or that one is at work in, a checkpoint that does not fit the config, a disk
            without room for the finished model, gradients that are no longer numbers, step after
            step, other processes than `[parallel]` says, or one that was lost, a device that is
            not there.
    """
    device = choose_device(config.training.device)
    with joined(config.parallel, device) as ranks, claimed(out, ranks):
        resume = resume or from_step is not None or was_restarted()
        console = Console(file=stream or sys.stdout, quiet=not ranks.is_first)
        return _train(config, out, ranks, console, resume=resume, from_step=from_step)


def _train(
    config: TrainConfig,
    out: Path,
    ranks: Ranks,
    console: Console,
    *,
    resume: bool,
    from_step: int | None,
) -> dict[str, Any] | None:
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
    say = functools.partial(print_line, console)
    kind = ranks.first_then_others(lambda: make_kind(config, out, say, ranks))
    model = with_special_ids(config.model, kind.tokenizer)
    config = config.model_copy(update={"model": model})
    trainer = Trainer(config, out, kind, ranks, begins=not steps)
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
        ranks: Ranks | None = None,
        *,
        begins: bool = True,
    ) -> None:
        """With `begins`, the weights are drawn, or taken from `[start]`; else `resume` follows."""
        self.ranks = ranks or Ranks()
        training = config.training
        keep_freed_memory()
        if training.fuse:
            kernels.enable_fusion()
        torch.manual_seed(training.seed)
        self.config, self.out, self.kind = config, out, kind
        self.learner = Learner(config, kind.device, self.ranks, begins=begins)
        self.model = self.learner.model
        self.saver = Saver(self.ranks) if self.ranks.size > 1 else None
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
        log = MetricsLog(self.out, self.step) if self.ranks.is_first else None
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
                if log is not None:
                    self._say_what_to_know(log, display.say, peak)
                return self._run(log, display, interruption)
        finally:
            if log is not None:
                log.close()

    def _say_what_to_know(
        self, log: MetricsLog, say: Callable[[str], None], peak: float | None
    ) -> None:
        if not log.has_tensorboard:
            say("tensorboard is not installed; metrics go to metrics.jsonl only")
        for note in self.kind.notes(self.config.training.steps):
            say(note)
        times = 1.0
        if peak is not None and self.config.training.dtype == "bfloat16":
            times = measure_gemm_peak(torch.float32) / peak
        for note in notes_before(
            self.config,
            self.out,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            float32_times=times,
            counts_first=self.learner.counts_first,
        ):
            say(note)

    def _run(
        self, log: MetricsLog | None, display: TrainingDisplay, interruption: Interruption
    ) -> dict[str, Any] | None:
        steps, every = self.config.training.steps, self.config.evaluation.every
        if every and self.step == 0 and self.kind.evaluates_first:
            row = self.evaluate(display.say)
            display.say(f"before the first step: {self.kind.sentence(row)}")
            if log is not None and (problem := log.write({"step": 0, **row})) is not None:
                display.say(problem)
        while self.step < steps:
            before = self.kind.tokens
            row = self._logged_step()
            read = self.kind.tokens - before
            if (problem := row.pop("problem", None)) is not None:
                display.say(f"step {self.step} is skipped, no weight was moved: {problem}")
            if every and (self.step % every == 0 or self.step == steps):
                row |= self.evaluate(display.say)
                display.say(f"step {self.step}: {self.kind.sentence(row)}")
            if log is not None and (problem := log.write(row)) is not None:
                display.say(problem)
            if row["loss"] is not None:
                display.update(self.step, row["loss"], read, row["seconds"])
            if (news := self.watch.news()) is not None:
                display.say(f"{news}; {self._way_back()}")
            if self.ranks.any(interruption.requested) and self.step < steps:
                if (path := self._try_to_save(display.say, wait=True)) is not None:
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

    def _way_back(self) -> str:
        training = self.config.training
        saved = saved_steps(self.out / "checkpoints")
        return way_back(saved, training.muon_learning_rate, training.adamw_learning_rate)

    def _try_to_save(self, say: Callable[[str], None], *, wait: bool = False) -> Path | None:
        """Write a checkpoint, or begin to; where the disk is full, say so and return None."""
        try:
            path = self.save()
            if wait:
                self._finish_saving()
            return path
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
        if self.kind.device.type != "cpu" or self.config.kind == "rl":  # which mostly draws answers
            return None
        if self.ranks.size > 1:  # of which each would measure what the others leave
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
        factor = self._learning_rate_factor()
        row: dict[str, Any] = {"loss": 0.0, "learning_rate_factor": factor}
        for parts in self.kind.updates(self.model, self.step):
            row = self.learner.move(self.kind, parts, self.step + 1, factor)
            if "problem" in row:
                break
        self.step += 1
        if "problem" in row:
            self._count_skipped(row["problem"])
            return row
        self.watch.add(self.step, row["loss"])
        return row | self.kind.row()

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
        found = self.kind.evaluate(self.model, self.out, self.step, say)
        let_go(self.model)
        return found

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
            "config": plain(self.config),
        }
        self._finish_saving()
        model = self._whole_model()

        def save(folder: Path) -> None:
            save_weights(model, folder)
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

        self.ranks.first_alone(lambda: save_somewhere(save, self.out, say))
        return summary

    def _whole_model(self) -> CausalLM:
        """Return the finished network; of one that is dealt, on the first rank alone."""
        if self.ranks.size == 1:
            return self.model
        if self.ranks.is_first:
            return whole_copy(self.model, self.config.training.torch_dtype, torch.device("cpu"))
        for _ in each_whole(self.model):  # gathered by all, kept by the first
            pass
        return self.model

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this very moment, or begin to; return its folder.

        Several ranks write it while they go on; it appears when all of it is there.

        Besides the last few, the one from before the learning rate decayed is kept: more steps
        can continue from it. Those of later steps belong to a run that was wound back.
        """
        tensors = self.learner.tensors()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warmup_steps": self.warmup_steps,
            "l1_weight": self.learner.l1.weight,
            "threads": torch.get_num_threads(),
            "tokens_before": self.tokens_before,
            "tokens": self.kind.tokens,
            "batches": self.kind.state_dict(),
            "config": plain(self.config),
        }
        folder = self.out / "checkpoints"
        path, step = checkpoint_path(folder, self.step), self.step
        fails = self.watch.is_failing  # then those from before it failed are the way back

        def prune() -> None:
            if not fails:
                past = [saved for saved in saved_steps(folder) if saved <= step]
                keep = past[-self.config.checkpoints.keep :]
                prune_checkpoints(folder, {*keep, self._decay_start})

        if self.saver is not None:
            self.saver.begin(path, tensors, state, prune)
        else:
            save_checkpoint(path, tensors, state)
            prune()
        return path

    def _finish_saving(self) -> None:
        if self.saver is not None:
            self.saver.finish()

    def resume(self, from_step: int | None = None) -> list[str]:
        """Continue from the last checkpoint that fits; return what the user should know.

        Args:
            from_step: go back to the checkpoint of this step instead.

        Raises:
            UserError: it is damaged, or was made with a config that differs where it may not, or
                the learning rate had decayed already in all checkpoints and steps are added.
        """
        path, state = last_fitting_checkpoint(self.out / "checkpoints", self.config, from_step)
        notes = [f"continuing from {path}", *check_same_config(self.config, state["config"], path)]
        if self.ranks.size > 1 or is_dealt(path):
            tensors = read_dealt(path, self.learner.blank_tensors, self.ranks)
        else:
            tensors = read_tensors(path)
        self.learner.take(tensors)
        self.kind.load_state_dict(state["batches"])
        self.step, self.seconds = state["step"], state["seconds"]
        training = self.config.training  # older checkpoints do not say how much was read
        per_step = training.batch_size * self.config.data.sequence_length
        self.kind.tokens = state.get("tokens", self.step * per_step)
        self.tokens_before = state.get("tokens_before", 0)
        self.warmup_steps, self.learner.l1.weight = state["warmup_steps"], state["l1_weight"]
        self.watch = Watch(self.config.model.vocab_size, self.warmup_steps)
        threads = torch.get_num_threads()
        if state.get("threads", threads) != threads:
            notes.append(
                f"the checkpoint was made with {state['threads']} threads, this process has "
                f"{threads}: the last bits of the results may differ"
            )
        return notes
