"""What a report is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from moescope.lab.words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A drawn figure."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """Numbers under a title."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """One finding, told.

    Attributes:
        title, paragraphs: text.
        file: name of the JSON file with all numbers, or of several, with commas.
        version: of the moescope that measured.
        commands: that made them, where they are known.
        figures: by title, not drawn yet.
        charts: the same, drawn.
        tables: of numbers.
    """

    title: str
    paragraphs: list[str]
    file: str
    version: str
    commands: list[str] = field(default_factory=list[str])
    figures: "dict[str, Figure]" = field(default_factory=dict[str, "Figure"])
    charts: list[Chart] = field(default_factory=list[Chart])
    tables: list[Table] = field(default_factory=list[Table])

    @property
    def stem(self) -> str:
        """What its charts are called: as its files."""
        return "-".join(Path(name).stem for name in self.file.split(", "))


def seen(held_out: dict[str, bool], domains: Sequence[str], words: Words) -> str:
    """Whether the models were trained on what they read, as far as it is known."""
    unknown = [words.name(domain) for domain in domains if not held_out.get(domain)]
    if not unknown:
        return words.held_out
    return words.maybe_seen.format(domains=words.comma.join(unknown))


def commands(*made_by: str) -> list[str]:
    """Each command once; data that no command made has none."""
    return list(dict.fromkeys(filter(None, made_by)))
