"""Train every case of a study with every seed on the same text, and say what came out.

Each training is a process of its own on one thread, with a folder of its own. A study that was
stopped goes on where it was: finished trainings are not repeated, an interrupted one continues
from the checkpoint that it left.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moescope.errors import UserError
from moescope.lab.routers import STUDIES, Case
from moescope.lab.trainings import Training, run_all, steps_done, train_quietly
from moescope.scope.choices import Progress, observe
from moescope.scope.information import explained_by_token, jackknife
from moescope.scope.resampling import Interval, t_interval
from moescope.scope.saved import Saved
from moescope.scope.specialization import block_counts
from moescope.scope.texts import labelled_text
from moescope.training.config import TrainConfig
from moescope.training.text import prepare_text, with_special_ids

OBSERVED_BYTES = 20_000
"""Text of each domain on which the finished routers are observed."""
ROW = "row.json"


@dataclass(frozen=True)
class Row(Saved):
    """One finished training.

    Attributes:
        study, case, seed: which one.
        version: of moescope.
        command: that began the study.
        config: the whole training config.
        note: what a reader of the numbers must know.
        total_parameters, experts_per_token: of the network; the latter as observed.
        held_out_loss: domain -> nats a token.
        bits_per_byte: domain -> bits.
        max_violation: layer -> the busiest expert's surplus over an even share, on held-out text.
        dead_share: layer -> share of experts that received no token of it.
        mutual_information: layer -> bits that an expert tells about the domain.
        token_share: layer -> how far the token alone decides over its experts, 0 to 1.
        tokens: trained on.
        tokens_per_second: of training, on one thread beside the other processes.
    """

    noun: ClassVar[str] = "a row of a study"

    study: str
    case: str
    seed: int
    version: str
    command: str
    config: dict[str, Any]
    note: str
    total_parameters: int
    experts_per_token: float
    held_out_loss: dict[str, float]
    bits_per_byte: dict[str, float]
    max_violation: dict[int, float]
    dead_share: dict[int, float]
    mutual_information: dict[int, float]
    token_share: dict[int, float]
    tokens: int
    tokens_per_second: float

    @property
    def measures(self) -> dict[str, float]:
        """Each quantity as one number: the mean over domains or layers."""
        return {
            "held_out_loss": statistics.fmean(self.held_out_loss.values()),
            "bits_per_byte": statistics.fmean(self.bits_per_byte.values()),
            "max_violation": statistics.fmean(self.max_violation.values()),
            "dead_share": statistics.fmean(self.dead_share.values()),
            "mutual_information": statistics.fmean(self.mutual_information.values()),
            "token_share": statistics.fmean(self.token_share.values()),
            "experts_per_token": self.experts_per_token,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class CaseSummary:
    """A case over its seeds.

    Attributes:
        case: its name.
        note: what a reader of the numbers must know.
        seeds: how many.
        measures: name -> mean with its 95 % interval over seeds (Student's t).
        against_first: name -> mean difference from the study's first case with the same seed,
            with its interval: the same first weights and the same text in the same order.
    """

    case: str
    note: str
    seeds: int
    measures: dict[str, Interval]
    against_first: dict[str, Interval]


@dataclass(frozen=True)
class Study(Saved):
    """All trainings of a study, and what they say together.

    Attributes:
        study: its name.
        rows: one for each training.
        summaries: one for each case.
    """

    noun: ClassVar[str] = "a study"

    study: str
    rows: list[Row]
    summaries: list[CaseSummary]


@dataclass(frozen=True)
class Task(Training):
    """One training of a study."""

    study: str
    case: Case
    seed: int
    command: str


def run_study(
    name: str,
    base: TrainConfig,
    out: Path,
    *,
    seeds: int,
    workers: int,
    command: str,
    progress: Progress,
) -> Study:
    """Do every training of a study that is not done yet; return all of them.

    Args:
        name: of `STUDIES`.
        base: what every case changes; it names the text.
        out: receives a folder for each training, the token files, and `study.json`.
        seeds: trainings of each case, with seeds from 0; two or more.
        workers: processes at a time.
        command: kept in the rows.
        progress: called with (optimizer steps done, steps in all).

    Raises:
        UserError: there is no such study, text or fitting shape, or `out` holds trainings of
            another config.
    """
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}; choose from {', '.join(STUDIES)}")
    cases = STUDIES[name](base.model)
    text = prepare_text(base.data, base.model, out, lambda _: None)
    if not text.held_out.domains:
        raise UserError(
            f"{base.data.source} has no held-out text to judge by; give more than one document"
        )
    base = base.model_copy(update={"model": with_special_ids(base.model, text.tokenizer)})
    tasks = [
        Task(
            study=name,
            case=case,
            seed=seed,
            config=case.config(base, seed),
            folder=out / f"{number:02d}-seed-{seed}",
            shared_folder=out,
            command=command,
        )
        for seed in range(seeds)
        for number, case in enumerate(cases)
    ]
    waiting = [task for task in tasks if not _is_done(task)]
    run_all(run_task, waiting, workers, lambda: progress(*steps_done(tasks)))
    rows = [Row.from_file(task.folder / ROW) for task in tasks]
    study = Study(name, rows, summarise(rows))
    study.save(out / "study.json")
    return study


def summarise(rows: Sequence[Row]) -> list[CaseSummary]:
    """Put the seeds of each case together; every case has the same seeds, in the same order."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    first = [row.measures for row in next(iter(by_case.values()))]
    summaries: list[CaseSummary] = []
    for case, mine in by_case.items():
        measures = [row.measures for row in mine]
        summaries.append(
            CaseSummary(
                case=case,
                note=mine[0].note,
                seeds=len(mine),
                measures={name: t_interval([m[name] for m in measures]) for name in first[0]},
                against_first={
                    name: t_interval(
                        [m[name] - f[name] for m, f in zip(measures, first, strict=True)]
                    )
                    for name in first[0]
                },
            )
        )
    return summaries


# --- doing it ------------------------------------------------------------------------------------


def _is_done(task: Task) -> bool:
    """Whether a task's row is there already.

    Raises:
        UserError: it was made with another config.
    """
    if not (task.folder / ROW).exists():
        return False
    row = Row.from_file(task.folder / ROW)
    if row.config != task.config.model_dump(mode="json") or row.case != task.case.name:
        raise UserError(
            f"{task.folder} holds a training of another config; choose another folder, or give "
            "the options that the study began with"
        )
    return True


def run_task(task: Task) -> bool:
    """Train one case with one seed and write its row; False if the training was interrupted.

    Raises:
        UserError: as `training.trainer.train`.
    """
    trained = train_quietly(task)
    if trained is None:
        return False
    trainer, summary = trained
    config = task.config
    assert config.data.source is not None
    text = labelled_text(config.data.source, OBSERVED_BYTES, [trainer.kind.remembered])
    choices = observe(trainer.model, trainer.kind.tokenizer, text.documents)
    information, _ = jackknife([block_counts(choices, d) for d in range(len(choices.domains))])
    shares = [
        explained_by_token(choices.token_ids, choices.document, topk_ids)
        for topk_ids in choices.topk_ids
    ]
    chosen = [(topk_ids >= 0).sum(axis=1).mean() for topk_ids in choices.topk_ids]
    router: dict[int, dict[str, float]] = summary["router"]
    Row(
        study=task.study,
        case=task.case.name,
        seed=task.seed,
        version=version("moescope"),
        command=task.command,
        config=config.model_dump(mode="json"),
        note=task.case.note,
        total_parameters=sum(p.numel() for p in trainer.model.parameters()),
        experts_per_token=float(np.mean(chosen)),
        held_out_loss=summary["held_out_loss"],
        bits_per_byte=summary["bits_per_byte"],
        max_violation={layer: router[layer]["max_violation"] for layer in choices.layers},
        dead_share={layer: router[layer]["dead_share"] for layer in choices.layers},
        mutual_information=dict(zip(choices.layers, information.tolist(), strict=True)),
        token_share=dict(zip(choices.layers, shares, strict=True)),
        tokens=summary["tokens"],
        tokens_per_second=summary["tokens"] / summary["seconds"],
    ).save(task.folder / ROW)
    return True
