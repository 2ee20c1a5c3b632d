"""Progress on standard error, with the time that is left: a bar, or a line now and then."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from moescope.transfer import Lines


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function to call with (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console.print, description, "{:,}".format)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
