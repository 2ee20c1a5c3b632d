"""Ctrl-C as a request, which the training meets between two steps."""

import signal
from types import FrameType


class Interruption:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_again(self) -> None:
        """Forget the request, which could not be met; the next Ctrl-C is a first one."""
        self.requested = False
        for number in self._before:
            signal.signal(number, self._request)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
