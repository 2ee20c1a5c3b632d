"""The published shapes, by name."""

from dataclasses import dataclass
from pathlib import Path

from moescope.config import ModelConfig
from moescope.families import open_config, read_config
from moescope.published import PUBLISHED

BOX = Path(__file__).parent / "box"
"""Folder of the models that come with the package."""


@dataclass(frozen=True)
class Entry:
    """A published shape.

    Attributes:
        source: the Hub name whose `config.json` it is.
        config: the shape.
    """

    source: str
    config: ModelConfig


def catalog() -> dict[str, Entry]:
    """Return every shape by its short name, the model in the box first."""
    entries = {
        path.parent.name: Entry("in the box", open_config(path))
        for path in sorted(BOX.glob("*/config.json"))
    }
    for source, fields in PUBLISHED.items():
        name = source.split("/")[1].lower().removesuffix("-base")
        entries[name] = Entry(source, read_config(fields, source))
    return entries
