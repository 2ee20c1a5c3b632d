"""A bar on standard error with the time that is left; nothing where that is no terminal."""

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function to call with (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
