"""Which text a training learned from and which it held out, remembered beside the model.

Nothing of the text is kept but sums of hashes, by which the same text is known again. So a model
can later be judged on what it has not seen, or it can be said that nobody knows.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moescope.errors import UserError
from moescope.files import write_text
from moescope.text.documents import hash_of

FILE = "trained_text.json"


def hash_number(text: str) -> int:
    """Return the first 64 bits of a document's hash, by which it is held out or not."""
    return int.from_bytes(hash_of(text)[:8])


@dataclass(frozen=True)
class Fingerprint:
    """By what some documents are known again, in whatever order they come.

    Attributes:
        documents: how many.
        digest: the sum of their hash numbers, modulo 2^64.
    """

    documents: int = 0
    digest: int = 0

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        return Fingerprint(self.documents + other.documents, (self.digest + other.digest) % 2**64)


@dataclass(frozen=True)
class TrainedDomain:
    """One domain of a training's text.

    Attributes:
        trained: the documents that were trained on.
        held_out: those that were not.
        held_out_below: the hash number below which a document was held out; None where folders
            said what is held out.
    """

    trained: Fingerprint
    held_out: Fingerprint
    held_out_below: int | None

    def limit(self, seen: Fingerprint) -> int | None:
        """Return the hash number below which `seen` documents were not trained on.

        0 if all were trained on, 2^64 if none was, None if they are other documents, of which
        nothing is known.
        """
        if seen == self.held_out:
            return 2**64
        if seen == self.trained + self.held_out and self.held_out_below is not None:
            return self.held_out_below
        return 0 if seen == self.trained else None


@dataclass(frozen=True)
class TrainedText:
    """The text of a training, by domain."""

    domains: dict[str, TrainedDomain]

    def limit(self, seen: Fingerprint) -> int | None:
        """As `TrainedDomain.limit`, whatever the domain is called now."""
        limits = [domain.limit(seen) for domain in self.domains.values()]
        return next((limit for limit in limits if limit is not None), None)

    def save(self, folder: Path) -> None:
        """Write `trained_text.json` into a model's folder, atomically."""
        write_text(folder / FILE, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, model: Path | None) -> "TrainedText | None":
        """Read what a model's folder remembers; None for a file, or where nothing is remembered.

        Raises:
            UserError: the file is damaged.
        """
        if model is None or not (file := model / FILE).is_file():
            return None
        try:
            domains: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["domains"]
            return cls(
                {
                    name: TrainedDomain(
                        Fingerprint(**fields["trained"]),
                        Fingerprint(**fields["held_out"]),
                        fields["held_out_below"],
                    )
                    for name, fields in domains.items()
                }
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}); delete it or fetch it again") from error
