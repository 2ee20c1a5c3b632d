"""Writing files so that a reader sees the old content or the new, never a part; reading JSON."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from moescope.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    Raises:
        UserError: the folder cannot be written or the disk is full; `path` is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.chmod(0o666 & ~_umask())
            fsync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose "
            "another folder (what was saved before is untouched)"
        ) from error


@contextmanager
def atomic_folder(folder: Path) -> Generator[Path]:
    """Yield a name for a folder beside `folder`, which takes its place if all goes well.

    Raises:
        UserError: the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: it is not there, not JSON, or no object.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); repair or remove it") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the file") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds no JSON object; repair or remove it")
    return cast("dict[str, Any]", parsed)


def _umask() -> int:
    """Return the process's file mask, which some libraries that write files disregard."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
