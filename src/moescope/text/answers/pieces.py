"""What an answer is made of, and the stream of text that it is read from.

Readers of answers are generators over a `Source`: they yield what has become certain, and None
where more text must come.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Thought:
    """A piece of the chain of thought."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of what is said."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool's call begins."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments, as JSON, of the call that began last."""

    text: str


Piece = Thought | Content | Call | Arguments
Result = TypeVar("Result")
Pieces = Generator[Piece | None, None, Result]
Texts = Generator[str | None, None, Result]
Waits = Generator[None, None, Result]


class Source:
    """Text that comes bit by bit.

    Attributes:
        final: whether no more comes.
    """

    def __init__(self) -> None:
        self._text = ""
        self.final = False

    def add(self, text: str, *, final: bool) -> None:
        """Take the next bit."""
        self._text += text
        self.final = self.final or final

    def put_back(self, text: str) -> None:
        """Have `text` come next."""
        self._text = text + self._text

    def until(self, *marks: str) -> Texts[str | None]:
        """Yield the text before the first of `marks`; return the mark, None at the text's end."""
        while True:
            found = [(at, -len(mark), mark) for mark in marks if (at := self._text.find(mark)) >= 0]
            if found:
                at, _, mark = min(found)
                before, self._text = self._text[:at], self._text[at + len(mark) :]
                if before:
                    yield before
                return mark
            kept = 0 if self.final else held_back(self._text, marks)
            ready, self._text = (
                self._text[: len(self._text) - kept],
                self._text[len(self._text) - kept :],
            )
            if ready:
                yield ready
            if self.final:
                return None
            yield None

    def take(self, *marks: str) -> Waits[tuple[str, str | None]]:
        """Return the text before the first of `marks`, and the mark; None at the text's end."""
        texts, taken = self.until(*marks), ""
        while True:
            try:
                text = next(texts)
            except StopIteration as stop:
                return taken, stop.value
            if text is None:
                yield None
            else:
                taken += text

    def begins(self, mark: str, *, after_blanks: bool = True) -> Waits[bool]:
        """Whether `mark` comes next, `after_blanks` or at once; then all of it is taken."""
        while True:
            text = self._text.lstrip() if after_blanks else self._text
            if text.startswith(mark):
                self._text = text[len(mark) :]
                return True
            if self.final or not mark.startswith(text):
                return False
            yield None

    def json_value(self) -> Texts[None]:
        """Yield the text of the one JSON value that comes next, blanks before it left out."""
        while not self.final and not self._text.strip():
            yield None
        self._text = self._text.lstrip()
        depth, in_string, escaped, is_scalar = (
            0,
            False,
            False,
            self._text[:1] not in ("{", "[", '"'),
        )
        while True:
            ends_at = None
            for at, character in enumerate(self._text):
                if in_string:
                    in_string = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                elif is_scalar:
                    if character in ",}] \n\r\t":
                        ends_at = at
                        break
                    continue
                elif character == '"':
                    in_string = True
                else:
                    depth += (character in "{[") - (character in "}]")
                if not in_string and depth <= 0:
                    ends_at = at + 1
                    break
            ready = self._text[:ends_at]
            self._text = "" if ends_at is None else self._text[ends_at:]
            if ready:
                yield ready
            if ends_at is not None or self.final:
                return
            yield None


def each(kind: Callable[[str], Piece], texts: Texts[Result]) -> Pieces[Result]:
    """Make pieces of texts; return what the texts return."""
    while True:
        try:
            text = next(texts)
        except StopIteration as stop:
            return stop.value
        yield None if text is None else kind(text)


def gathered(texts: Texts[None]) -> Waits[str]:
    """Return all texts as one."""
    taken = ""
    for text in texts:
        if text is None:
            yield None
        else:
            taken += text
    return taken


def said(source: Source, *marks: str) -> Pieces[str | None]:
    """Yield content up to one of `marks`; return the mark. Blanks before a mark are no content."""
    texts, blanks = source.until(*marks), ""
    while True:
        try:
            text = next(texts)
        except StopIteration as stop:
            if stop.value is None and blanks:
                yield Content(blanks)
            return stop.value
        if text is None:
            yield None
            continue
        kept = text.rstrip() if marks else text
        if kept:
            yield Content(blanks + kept)
            blanks = ""
        blanks += text[len(kept) :]


def held_back(text: str, awaited: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of the `awaited` texts begins."""
    longest = max((len(one) for one in awaited), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in awaited):
            return length
    return 0
