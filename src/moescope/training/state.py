"""Checkpoints of a training: everything that continues it bit for bit, in safetensors and JSON.

A checkpoint is a folder that appears whole, by one rename, or not at all.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moescope.errors import UserError

TENSORS, STATE = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep`; return its path.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    path = folder / f"step-{step:06d}"
    partial = folder / f".{path.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for written in (partial / TENSORS, partial / STATE, partial):
            _fsync(written)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {path} ({error}); free some space or choose another "
            "folder, then continue with --resume from the last checkpoint, which is untouched"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        return load_file(path / TENSORS), state
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({error}); delete it to continue from an older one"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
