"""What a model's files say of the texts it makes: which tokens end them, and how they are drawn.

A folder says so in `generation_config.json`, a GGUF file in its metadata. A request or an option
counts for more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.errors import UserError
from moescope.files import read_object, write_text

FILE = "generation_config.json"
RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (1, 2**31),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
"""Fields of `SamplingParams` for which a file may have another default, and their values."""


@dataclass(frozen=True)
class GenerationDefaults:
    """When a text ends, and how it is drawn, unless asked otherwise.

    Attributes:
        end_ids: tokens that end a text, besides those of the config and the tokenizer.
        sampling: values of fields of `SamplingParams`; others have the defaults of that class.
    """

    end_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of(cls, source: Path, ends: Any, sampling: Mapping[str, Any]) -> "GenerationDefaults":
        """Check what a file says.

        Args:
            source: of it all, for messages.
            ends: an id, several, or None.
            sampling: fields of `SamplingParams`; None, and a `top_k` of 0 or less, say nothing.

        Raises:
            UserError: a value has no meaning.
        """
        ids: list[Any] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise UserError(
                f"{source}: eos_token_id is {ends!r}, no id of a token; repair the file"
            )
        told = {name: value for name, value in sampling.items() if value is not None}
        if type(told.get("top_k")) is int and told["top_k"] <= 0:
            del told["top_k"]
        for name, value in told.items():
            low, high = RANGES[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or (name == "top_k" and value % 1):
                raise UserError(
                    f"{source}: {name} is {value!r}, but goes from {low:g} to {high:g}; repair the "
                    "file"
                )
        return cls(frozenset(ids), told)

    @classmethod
    def load(cls, folder: Path) -> "GenerationDefaults":
        """Read a folder's `generation_config.json`; without one, nothing is said.

        `do_sample: false` takes the likeliest token, whatever else is said; where it is not said,
        what is said of a draw counts.

        Raises:
            UserError: it is not what its name says.
        """
        file = folder / FILE
        if not file.exists():
            return cls()
        fields = read_object(file)
        sampling = {name: fields.get(name) for name in RANGES}
        if fields.get("do_sample") is False:
            sampling = {
                "temperature": 0,
                "repetition_penalty": fields.get("repetition_penalty"),
            }
        elif fields.get("do_sample") and sampling["temperature"] is None:
            sampling["temperature"] = 1.0
        return cls.of(file, fields.get("eos_token_id"), sampling)

    def all_ends(self, *named: int | list[int] | None) -> frozenset[int]:
        """Return `end_ids` and those that a config and a tokenizer name besides."""
        lists = [ids if isinstance(ids, list) else [ids] for ids in named]
        return self.end_ids | {i for ids in lists for i in ids if i is not None}

    def save(self, folder: Path) -> None:
        """Write `generation_config.json`, if there is something to be said."""
        if not self.end_ids and not self.sampling:
            return
        fields: dict[str, Any] = {"eos_token_id": sorted(self.end_ids)} if self.end_ids else {}
        is_drawn = bool(self.sampling.get("temperature"))
        if self.sampling:
            fields["do_sample"] = is_drawn
        fields |= {n: value for n, value in self.sampling.items() if is_drawn or n != "temperature"}
        write_text(folder / FILE, json.dumps(fields, indent=2) + "\n")
