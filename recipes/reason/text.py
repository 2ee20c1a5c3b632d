"""Write the text of the small models: `python recipes/reason/text.py --out data/reason`.

`text/` is for pretraining: sums of 1 to 3 digits and letters in words of 2 to 6, each answered in
one of several ways (`chains.py`), half of them at once or not well. `cold/` is for a cold start:
a few hundred chats with the best way alone.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import chains
import letters

DOCUMENTS = {"train": 80_000, "held_out": 1_000}
"""Of each task."""
COLD = {"train": 150, "held_out": 50}
MOST_DIGITS, LONGEST_WORD = 3, 6
Maker = Callable[[random.Random, bool], tuple[str, str]]


def a_sum(rng: random.Random, best: bool) -> tuple[str, str]:
    """Return a question and an answer to it; the best way or any."""
    digits = rng.randint(1, MOST_DIGITS)
    first, second = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    own = chains.written(chains.columns(first, second))
    return f"{first}+{second}=?", own if best else chains.a_sum(first, second, rng)


def a_count(rng: random.Random, best: bool) -> tuple[str, str]:
    letter, word = letters.word_of(rng, rng.randint(letters.SHORTEST, LONGEST_WORD))
    own = chains.written(chains.tally(letter, word))
    return f"{letter} in {word}?", own if best else chains.a_count(letter, word, rng)


MAKERS: dict[str, Maker] = {"sums": a_sum, "letters": a_count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for part in DOCUMENTS:
        for task, make in MAKERS.items():
            rng = random.Random(f"{arguments.seed} {part} {task}")
            texts = (make(rng, False) for _ in range(DOCUMENTS[part]))
            write(
                arguments.out / "text" / part / task / "text.jsonl",
                [{"text": f"<｜User｜>{asked}<｜Assistant｜>{told}"} for asked, told in texts],
            )
            write(
                arguments.out / "cold" / part / task / "chats.jsonl",
                [chat(*make(rng, True)) for _ in range(COLD[part])],
            )


def chat(asked: str, told: str) -> dict[str, object]:
    """Return a record of a chat, as fine-tuning reads it."""
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    }


def write(file: Path, records: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
