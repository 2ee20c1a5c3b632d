"""Gather what the model in the box is to know by heart: `by_heart.py CORPUS --out data/by-heart`.

Writes OUT/train/<domain>/text.jsonl and OUT/held_out/<domain>/text.jsonl. Of each domain the pieces
that CORPUS has several times (famous poems, how books begin, tales, small functions, answers about
models), and common words, fill four fifths; the rest is other text of it, so that little is lost.
"""

import argparse
import random
from pathlib import Path

import gather
import sources
from chats import texts, well_known

BYTES = 1_500_000
"""Of a domain."""
HELD_OUT = 60
"""Documents of a domain; they say how much is lost."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for folder in sorted((arguments.corpus / "train").iterdir()):
        rng = random.Random(f"{arguments.seed} {folder.name}")
        documents = texts(folder / "text.jsonl")
        known = well_known(documents, least=3)
        if folder.name == "translation":
            known = list(sources.translation_documents(sources.own_words(gather.OWN), rng))
        others = sorted(set(documents) - set(known))
        rng.shuffle(others)
        share = BYTES * 4 // 5 if known else 0
        train = filled(known, share) + filled(others, BYTES - share)
        rng.shuffle(train)
        held_out = texts(arguments.corpus / "held_out" / folder.name / "text.jsonl")
        for part, chosen in (("train", train), ("held_out", held_out[:HELD_OUT])):
            size = gather.write(arguments.out / part / folder.name / "text.jsonl", chosen)
            print(f"{part:8} {folder.name:13} {len(chosen):7} documents {size:9} bytes")


def filled(documents: list[str], size: int) -> list[str]:
    """Return documents, from the first again after the last, until they have so many bytes."""
    taken: list[str] = []
    while documents and size > 0:
        for document in documents:
            taken.append(document)
            size -= len(document.encode())
            if size <= 0:
                break
    return taken


if __name__ == "__main__":
    main()
