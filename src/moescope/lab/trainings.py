"""Trainings in processes of their own: each on one thread, in a folder of its own, and resumed."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from moescope.training.config import TrainConfig
from moescope.training.kinds import make_kind
from moescope.training.state import saved_steps
from moescope.training.trainer import Trainer

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Training:
    """What to train, and where.

    Attributes:
        config: of the training.
        folder: receives it.
        shared_folder: holds the token files, and the tokenizer if none is named.
    """

    config: TrainConfig
    folder: Path
    shared_folder: Path


T = TypeVar("T", bound=Training)


def run_all(
    run: Callable[[T], bool], trainings: Sequence[T], workers: int, look: Callable[[], None]
) -> None:
    """Run trainings in processes; begin none after a failure or Ctrl-C, which they see too.

    Args:
        run: does a training, a function of a module's top level; False if it was told to stop.
        trainings: what to do.
        workers: processes at a time.
        look: called now and then.

    Raises:
        KeyboardInterrupt: a training was told to stop, and saved itself.
    """
    context, left = multiprocessing.get_context("spawn"), iter(trainings)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run, training) for training in islice(left, workers)}
        while waiting:
            done, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            look()
            if not all(future.result() for future in done):
                raise KeyboardInterrupt
            # None waits inside the pool, from where it could not be called back.
            waiting |= {pool.submit(run, training) for training in islice(left, len(done))}


def train_quietly(training: Training) -> tuple[Trainer, dict[str, Any]] | None:
    """Begin a training, or go on with it; return its end and summary, None if it was interrupted.

    Raises:
        UserError: as `training.trainer.train`.
    """
    torch.set_num_threads(1)
    config = training.config
    kind = make_kind(config, training.shared_folder, lambda _: None)
    begun = bool(saved_steps(training.folder / "checkpoints"))
    trainer = Trainer(config, training.folder, kind, begins=not begun)
    if begun:
        trainer.resume()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        summary = trainer.run(Console(file=nowhere))
    return None if summary is None else (trainer, summary)


def steps_done(trainings: Sequence[Training]) -> tuple[int, int]:
    """Optimizer steps done, as the trainings' logs tell, and steps in all."""
    done = 0
    for training in trainings:
        log = training.folder / "metrics.jsonl"
        done += len(log.read_bytes().splitlines()) if log.exists() else 0
    return done, sum(training.config.training.steps for training in trainings)
