"""When a continuation ends: texts that stop it, found as they stream by."""

from collections.abc import Sequence

from moescope.text.answers.pieces import held_back


class StopFinder:
    """Let text through until a stop text appears, holding back what may yet become one.

    Attributes:
        found: the stop text that appeared; None so far.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str, *, final: bool = False) -> str:
        """Take the next piece and return what is certain not to begin a stop text.

        With `final` nothing more comes, and what was held back is returned.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        starts = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if starts:
            (at, self.found), self._held = min(starts), ""
            return text[:at]
        keep = 0 if final else held_back(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
