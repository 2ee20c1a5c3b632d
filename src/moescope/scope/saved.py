"""Plain data that is written to JSON and read back, checked."""

from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from moescope.errors import UserError
from moescope.files import write_text


class Saved:
    """What dataclasses inherit to have a JSON form.

    Attributes:
        noun: what a user calls it, with its article: "a trace".
    """

    noun: ClassVar[str]

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        return _adapter(type(self)).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UserError: the text is something else.
        """
        try:
            return _adapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the text"
            noun = cls.noun.partition(" ")[2]
            raise UserError(f"this is no {noun}: {place}: {first['msg']}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON into a file, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {cls.noun} from {path}: {error}") from error
        return cls.from_json(text)


@cache
def _adapter(kind: type[Saved]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def rounded(number: float) -> float:
    """Return the number at four significant digits, which is what pictures need."""
    return float(f"{number:.4g}")
