"""From which checkpoint a training goes on, and what may have changed since."""

from pathlib import Path
from typing import Any

from moescope.errors import UserError
from moescope.training.config import TrainConfig
from moescope.training.state import checkpoint_path, read_state, saved_steps

MAY_CHANGE = {
    "training.muon_learning_rate",
    "training.adamw_learning_rate",
    "training.clip",
    "training.steps",
    "training.warmup_fraction",
    "training.decay_fraction",
    "training.decay",
    "training.checkpoint_activations",
    "training.device",
    "data.source",
    "data.tokenizer",
    "evaluation.every",
    "evaluation.tokens",
    "checkpoints.every",
    "checkpoints.keep",
    "parallel.data",
    "parallel.expert",
}
"""Fields that a resumed training may give anew; other text is told by the batches' own key."""


def last_fitting_checkpoint(
    folder: Path, config: TrainConfig, wanted: int | None
) -> tuple[Path, dict[str, Any]]:
    """Return the path and JSON part of the last checkpoint that can go on to the config's steps.

    Args:
        folder: of the checkpoints.
        config: of the training that goes on.
        wanted: the step of the checkpoint to take instead.

    Raises:
        UserError: it is damaged, there is none of the wanted step, or the learning rate had decayed
            already in all of them and steps are added.
    """
    saved, steps = saved_steps(folder), config.training.steps
    if wanted is not None and wanted not in saved:
        there = ", ".join(map(str, saved))
        raise UserError(f"there is no checkpoint of step {wanted} in {folder}; it has {there}")
    for step in reversed(saved) if wanted is None else [wanted]:
        path = checkpoint_path(folder, step)
        state = read_state(path)
        before: dict[str, Any] = state["config"]["training"]
        decay_start = before["steps"] - round(before["decay_fraction"] * before["steps"])
        if step <= steps and (steps == before["steps"] or step <= decay_start):
            return path, state
    raise UserError(
        f"no checkpoint in {folder} can continue to {steps} steps: it must lie before "
        "that step and before the learning rate decayed; train anew in another folder"
    )


def check_same_config(config: TrainConfig, saved: dict[str, Any], checkpoint: Path) -> list[str]:
    """Refuse a config that differs from a checkpoint's where it may not; say where rates differ."""
    notes: list[str] = []
    ours, theirs = plain(config), plain(TrainConfig.model_validate(saved))
    if ours.pop("kind") != theirs.pop("kind"):
        raise UserError(
            f"{checkpoint} is of another kind of training than {config.kind!r}; start a "
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


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return a config as JSON-able values."""
    return config.model_dump(mode="json")
