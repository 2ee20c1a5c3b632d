"""Checkpoints of a training: everything that continues it bit for bit, in safetensors and JSON.

A checkpoint is a folder that appears whole, by one rename, or not at all. Checksums tell whether
it stayed whole.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moescope.errors import UserError
from moescope.files import fsync

TENSORS, STATE, CHECKSUMS = "state.safetensors", "state.json", "sha256.json"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of which `folder` holds a checkpoint, in order."""
    names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and return its path; one of the same step is replaced.

    Raises:
        UserError: the disk is full or the folder cannot be written; other checkpoints stay.
    """
    path = checkpoint_path(folder, step)
    partial = folder / f".{path.name}.partial"
    try:
        for abandoned in folder.glob(".step-*"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS
        )
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        checksums = {name: _digest(partial / name) for name in (TENSORS, STATE)}
        (partial / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        for written in (TENSORS, STATE, CHECKSUMS, "."):
            fsync(partial / written)
        if path.exists():
            path.rename(folder / f".{path.name}.replaced")
        partial.rename(path)
        fsync(folder)
        shutil.rmtree(folder / f".{path.name}.replaced", ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {path} ({error}); free some space, then continue with "
            "--resume from the last checkpoint, which is untouched"
        ) from error
    return path


def prune_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Delete all checkpoints but those of the steps in `keep`."""
    for step in saved_steps(folder):
        if step not in keep:
            shutil.rmtree(checkpoint_path(folder, step))


def read_state(path: Path) -> dict[str, Any]:
    """Read the JSON part of the checkpoint at `path`.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(_intact(path, STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of the checkpoint at `path`.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        return load_file(_intact(path, TENSORS))
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _intact(path: Path, name: str) -> Path:
    """Return a checkpoint's file, held to its checksum unless it is older than checksums are."""
    checksums = path / CHECKSUMS
    if checksums.exists():
        expected: dict[str, str] = json.loads(checksums.read_text(encoding="utf-8"))
        if expected.get(name) != _digest(path / name):
            raise ValueError(f"wrong checksum of {name}")
    return path / name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read the checkpoint {path} ({error}); delete it to continue from an older one"
    )
