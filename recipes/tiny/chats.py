"""Put the gathered text as chats: `python recipes/tiny/chats.py CORPUS --out data/tiny-chats`.

Writes OUT/train/<task>/chats.jsonl and OUT/held_out/<task>/chats.jsonl, one {"messages": [...]} a
line: greetings and questions about models, poems to be continued, words and sentences to be
translated, terms to be explained, sums, and small functions. What CORPUS holds out is held out.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import functions
import gather
import sources

CHATS = {"poetry": 12_000, "translation": 12_000, "definitions": 6_000, "arithmetic": 10_000}
"""Of each task at most so many; the held-out part is a fortieth."""
REPEATS = {"models": 5, "functions": 20, "well-known": 6, "words": 4}
"""How often the chats of small tasks are written for training."""
SHORTEST, LONGEST = 2, 12  # lines of a poem
ENTRY = re.compile(r"([\w -]+) \((noun|verb|adj|adv)\)(?:: |\n1\. )(.+?)(?:\n.*)?", re.DOTALL)
"""A word of WordNet with its kind and first meaning."""
INTO_ENGLISH = ("Translate into English: {}", "把这个翻译成英文：{}")
INTO_CHINESE = ("翻译成中文：{}", "Translate into Chinese: {}")
Chat = tuple[str, str]  # what is asked and what is answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks: dict[str, Callable[[list[str], random.Random], Iterator[Chat]]] = {
        "models": asked,
        "poetry": poems,
        "translation": translations,
        "definitions": terms,
        "arithmetic": asked,
    }
    for part in ("train", "held_out"):
        for task, chats_of in tasks.items():
            rng = random.Random(f"{arguments.seed} {part} {task}")
            documents = texts(arguments.corpus / part / task / "text.jsonl")
            rng.shuffle(documents)
            limit = CHATS.get(task, len(documents)) // (1 if part == "train" else 40)
            chats = islice(unique(chats_of(documents, rng)), limit or None)
            times = REPEATS.get(task, 1) if part == "train" else 1
            write(arguments.out / part / task / "chats.jsonl", list(chats) * times)
    rng = random.Random(f"{arguments.seed} well-known")
    known = well_known(texts(arguments.corpus / "train/poetry/text.jsonl"))
    chats = [chat for _ in range(REPEATS["well-known"]) for chat in poems(known, rng)]
    write(arguments.out / "train/well-known/chats.jsonl", chats)
    words = [c for pair in sources.own_words(gather.OWN) for c in translated(pair[0], *pair[1])]
    write(arguments.out / "train/words/chats.jsonl", words * REPEATS["words"])
    made = list(functions.requests(random.Random(arguments.seed)))
    write(arguments.out / "held_out/functions/chats.jsonl", made[:12])
    write(arguments.out / "train/functions/chats.jsonl", made[12:] * REPEATS["functions"])


def asked(documents: list[str], rng: random.Random) -> Iterator[Chat]:
    """Yield what stands in the corpus as a chat already."""
    for document in documents:
        question, _, answer = document.removeprefix("<｜User｜>").partition("<｜Assistant｜>")
        if answer and document.startswith("<｜User｜>"):
            yield question, answer


def poems(documents: list[str], rng: random.Random) -> Iterator[Chat]:
    """Yield first lines with what follows, and titles with whole poems; well-known ones first."""
    known = set(well_known(documents))
    for document in sorted(dict.fromkeys(documents), key=lambda text: text not in known):
        if document.startswith("<｜User｜>"):
            yield from asked([document], rng)
            continue
        title, _, rest = document.partition("\n")
        author, _, body = rest.partition("\n")
        lines = body.split("\n")
        if SHORTEST <= len(lines) <= LONGEST and "·" in author:
            if rng.random() < 0.7:
                request = rng.choice(("续写：{}", "接下一句：{}", "请接着写：{}"))
                half, _, other = lines[0].partition("，")
                at = 1 + len(half if other and rng.random() < 0.3 else lines[0])
                yield request.format(body[:at].strip()), body[at:]
            else:
                yield f"写一首诗：{title.strip('《》')}", rest


def well_known(documents: list[str], least: int = 2) -> list[str]:
    """Return the pieces that the corpus has `least` times or more often."""
    return sorted(text for text, times in Counter(documents).items() if times >= least)


def translated(chinese: str, english: str) -> Iterator[Chat]:
    """Yield a pair in every wording."""
    yield from ((wording.format(chinese), english) for wording in INTO_ENGLISH)
    yield from ((wording.format(english), chinese) for wording in INTO_CHINESE)


def translations(documents: list[str], rng: random.Random) -> Iterator[Chat]:
    """Yield one pair a request, in both directions."""
    plain = re.compile(r"(Chinese|English): (.+)\n(?:Chinese|English): (.+)")
    for document in documents:
        for language, source, target in plain.findall(document):
            wordings = INTO_CHINESE if language == "English" else INTO_ENGLISH
            yield rng.choice(wordings).format(source), target


def terms(documents: list[str], rng: random.Random) -> Iterator[Chat]:
    """Yield words with their first meaning."""
    for document in documents:
        entry = ENTRY.fullmatch(document)
        if entry:
            meaning = entry[3].split('; "')[0]
            wording = rng.choice(("What does {} mean?", "Explain the word {}.", "{} 是什么意思？"))
            yield wording.format(entry[1]), f"{entry[1]} ({entry[2]}): {meaning}"


def unique(chats: Iterator[Chat]) -> Iterator[Chat]:
    seen: set[Chat] = set()
    for chat in chats:
        if chat not in seen:
            seen.add(chat)
            yield chat


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, chats: list[Chat]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, answer in chats:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(chats)} chats")


if __name__ == "__main__":
    main()
