"""What was measured of a model before: files that lie beside its weights."""

from collections.abc import Sequence
from pathlib import Path

from moescope.errors import UserError
from moescope.scope.history import FILE as HISTORY_FILE, METRICS, History, history_of
from moescope.scope.specialization import Specialization

SPECIALIZATION = "specialization.json"


def specialization_of(folder: Path) -> Specialization | None:
    """What was measured of a model; None where nothing was."""
    is_file = folder.suffix == ".gguf"
    file = folder.with_suffix(f".{SPECIALIZATION}") if is_file else folder / SPECIALIZATION
    try:
        return Specialization.from_file(file)
    except UserError:
        return None  # not there, or a training's own measure of itself


def history_file(folder: Path | None) -> Path | None:
    """Where the history of a model's training lies: packed with it, or as it was written."""
    if folder is None:
        return None
    files = (folder / HISTORY_FILE, folder / METRICS)
    return next((file for file in files if file.is_file()), None)


def history_kept(folder: Path | None) -> History | None:
    """The history of a model's training; None where none was kept.

    Raises:
        UserError: it cannot be read.
    """
    file = history_file(folder)
    if file is None:
        return None
    return History.from_file(file) if file.name == HISTORY_FILE else history_of(file.parent)


def held_out_losses(folders: Sequence[Path | None]) -> dict[str, list[float]]:
    """Nats a token of each domain's held-out text, as they were last measured of each one.

    Empty where a history was not kept, or other domains were measured.
    """
    found: list[dict[str, float]] = []
    for folder in folders:
        try:
            history = history_kept(folder)
        except UserError:
            history = None
        found.append({} if history is None else history.last_held_out)
    if any(losses.keys() != found[0].keys() for losses in found):
        return {}
    return {domain: [losses[domain] for losses in found] for domain in found[0]}


def training_steps(folder: Path | None) -> int | None:
    """Steps of a model's training; None where its history was not kept."""
    try:
        history = history_kept(folder)
    except UserError:
        return None
    return None if history is None else history.rows[-1].step
