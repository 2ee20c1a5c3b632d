"""A disk that is full when a training wants to save, which must not cost the training."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from moescope.errors import UserError

MAX_TRIES = 20
SECONDS_BETWEEN_TRIES = 30.0


def save_somewhere(
    save: Callable[[Path], None],
    out: Path,
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Save what only this process holds: in `out`, else wherever it fits, else wait for room.

    Args:
        save: writes everything into a folder.
        out: where it belongs.
        say: tells what is being tried.
        wait: for so many seconds.

    Raises:
        UserError: `out` has no room; the sentence names the folder where everything lies instead,
            or says that there is none.
    """
    if (failure := _failure(save, out)) is None:
        return
    for place in dict.fromkeys((Path(tempfile.gettempdir()), Path.home(), Path.cwd())):
        folder = place / f"{out.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not folder.exists():
            if _failure(save, folder) is None:
                raise UserError(
                    f"cannot write the finished model into {out} ({failure}); it lies in {folder} "
                    "instead, whole: free some space and move it"
                )
            shutil.rmtree(folder, ignore_errors=True)
    for left in range(MAX_TRIES, 0, -1):
        say(
            f"cannot write the finished model into {out} ({failure}) or anywhere else; free some "
            f"space: it is tried again every {SECONDS_BETWEEN_TRIES:.0f} s, {left} times more"
        )
        wait(SECONDS_BETWEEN_TRIES)
        if (failure := _failure(save, out)) is None:
            return
    raise UserError(
        f"cannot write the finished model into {out} ({failure}); free some space, then finish it "
        "with --resume from the last checkpoint if there is one"
    )


def _failure(save: Callable[[Path], None], folder: Path) -> str | None:
    """Try to save; return why it failed."""
    try:
        save(folder)
    except (UserError, OSError, SafetensorError) as error:
        return str(error)
    return None


def lacking_room(folder: Path, needed: int) -> str | None:
    """Return a warning if fewer than `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"only {free / 1e9:.1f} GB are free for {folder}; the model and its checkpoints take about "
        f"{needed / 1e9:.1f} GB"
    )
