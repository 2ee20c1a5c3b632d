"""How far something is, on standard error: a bar, or a line now and then."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def transfer_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function to call with (bytes that are here, bytes in all)."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console.print, description, lambda count: f"{count / 1e9:.2f} GB")
        return
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Lines:
    """Tells by a line every half minute how far something is, and how long it still takes."""

    def __init__(
        self, say: Callable[[str], None], description: str, shown: Callable[[int], str]
    ) -> None:
        self._say, self._description, self._shown = say, description, shown
        self._start = self._last = time.monotonic()
        self._done_at_start: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._done_at_start is None:
            self._done_at_start = done
        made = done - self._done_at_start
        if now - self._last < SECONDS_BETWEEN_LINES or made <= 0:
            return
        self._last = now
        left = timedelta(seconds=round((now - self._start) / made * (total - done)))
        self._say(f"{self._description}: {self._shown(done)} of {self._shown(total)}, {left} left")
