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


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint; one of the same step is replaced.

    Raises:
        UserError: the disk is full or the folder cannot be written; other checkpoints stay.
    """
    partial = begin_checkpoint(path)
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS
        )
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    publish_checkpoint(path, state)


def partial_path(path: Path) -> Path:
    """Return where a checkpoint lies while it is written."""
    return path.with_name(f".{path.name}.partial")


def begin_checkpoint(path: Path) -> Path:
    """Make the folder in which a checkpoint is written, and return it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    partial = partial_path(path)
    try:
        for abandoned in path.parent.glob(".step-*"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return partial


def publish_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Add the JSON part and checksums to a checkpoint's tensors, and let it appear.

    Raises:
        UserError: the disk is full or the folder cannot be written; other checkpoints stay.
    """
    partial, replaced = partial_path(path), path.with_name(f".{path.name}.replaced")
    try:
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        checksums = {file.name: _digest(file) for file in partial.iterdir()}
        (partial / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        for written in (*partial.iterdir(), partial):
            fsync(written)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        fsync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, reason: object) -> UserError:
    """Return what is said of a checkpoint that cannot be written; nothing of it stays."""
    shutil.rmtree(partial_path(path), ignore_errors=True)
    return UserError(
        f"cannot write the checkpoint {path} ({reason}); free some space, then continue with "
        "--resume from the last checkpoint, which is untouched"
    )


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
        raise damaged(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint that one process has written.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        return load_file(_intact(path, TENSORS))
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, error) from error


def is_dealt(path: Path) -> bool:
    """Whether several ranks have written a checkpoint, each its parts of the tensors."""
    return any(path.glob("shard-*.safetensors"))


def check_tensors(path: Path) -> None:
    """Hold all files of a checkpoint to their checksums.

    Raises:
        UserError: one is missing or damaged.
    """
    try:
        if (path / CHECKSUMS).exists():
            expected: dict[str, str] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
            for name in expected:
                _intact(path, name)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


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


def damaged(path: Path, error: object) -> UserError:
    return UserError(
        f"cannot read the checkpoint {path} ({error}); delete it to continue from an older one"
    )
