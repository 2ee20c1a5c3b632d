"""Progress on standard error, with the time that is left: a bar, or a line now and then."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function to call with (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console.print, description)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Tells by a line every half minute how far something is."""

    def __init__(self, say: Callable[[str], None], description: str) -> None:
        self._say, self._description = say, description
        self._start = self._last = time.monotonic()
        self._done_at_start: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._done_at_start is None:
            self._done_at_start = done
        made = done - self._done_at_start
        if now - self._last < SECONDS_BETWEEN_LINES or not made:
            return
        self._last = now
        left = timedelta(seconds=round((now - self._start) / made * (total - done)))
        self._say(f"{self._description}: {done:,} of {total:,}, {left} left")
