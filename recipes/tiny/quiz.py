"""Ask held-out sums: `python recipes/tiny/quiz.py MODEL CORPUS` prints the share of right answers.

The problems were never asked in training, in no wording and with no order of the operands.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import moescope
from moescope.api import Model

ASSISTANT, END_OF_THOUGHT = "<｜Assistant｜>", "</think>"
PROBLEMS = 400
AT_ONCE = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help='"tiny" or a folder')
    parser.add_argument("corpus", type=Path)
    arguments = parser.parse_args()
    outcomes = right_sums(moescope.load(arguments.model), arguments.corpus)
    for name, right in sorted(outcomes.items()):
        print(f"{name:24} {sum(right):4} of {len(right):4} right")
    total = [right for rows in outcomes.values() for right in rows]
    print(f"{'all':24} {sum(total):4} of {len(total):4} right ({sum(total) / len(total):.0%})")


def right_sums(model: Model, corpus: Path) -> dict[str, list[bool]]:
    """Ask a model held-out sums; whether each was right, by kind."""
    held_out = corpus / "held_out" / "arithmetic" / "text.jsonl"
    lines = held_out.read_text(encoding="utf-8").splitlines()[:PROBLEMS]
    asked = [json.loads(line)["text"].partition(ASSISTANT) for line in lines]
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), AT_ONCE):
        batch = asked[start : start + AT_ONCE]
        prompts = [question + ASSISTANT for question, _, _ in batch]
        for (question, _, worked), made in zip(
            batch, model.generate(prompts, max_tokens=256, temperature=0), strict=True
        ):
            spelled = model.tokenizer.decode(
                [token.id for token in made.tokens], skip_special_tokens=False
            )
            answer = spelled.rpartition(END_OF_THOUGHT)[2].partition("<")[0]
            outcomes[kind(question)].append(answer == worked.rpartition(END_OF_THOUGHT)[2])
    return outcomes


def kind(question: str) -> str:
    """Name a problem by its operators."""
    names = {"+": "add", "-": "subtract", "*": "multiply", "×": "multiply"}
    return " and ".join(names[operator] for operator in re.findall(r"(?<=[\d)])[-+*×]", question))


if __name__ == "__main__":
    main()
