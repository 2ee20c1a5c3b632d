"""The card of an edition: `python recipes/tiny/card.py FIRST SECOND CORPUS CHATS > CARD.md`.

FIRST and SECOND are models, CORPUS and CHATS what the second was trained on. On what was held out
of it: what a byte costs, sums, and the beginnings of the first ten documents of each domain and of
the first ten chats of each task, continued greedily by both. Nothing is picked.
"""

import argparse
import json
from pathlib import Path

from measure import held_out
from quiz import right_sums

import moescope
from moescope.api import Model
from moescope.server.examples import as_typed

SAMPLES = 10
BEGINNING, CONTINUATION = 24, 40
"""Tokens of a sample that are given, and that are made."""
ANSWER = 120
EDITIONS = ("first", "second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("chats", type=Path)
    arguments = parser.parse_args()
    folders = (arguments.first, arguments.second)
    models = tuple(moescope.load(each, backend="cpu", quantize="int8") for each in folders)
    print("# Both editions of `tiny`, on text that was held out of the second's\n")
    print("Made by `recipes/tiny/card.py`. The first edition may have read some of it.\n")
    print_losses(folders, arguments.corpus)
    print_sums(models, arguments.corpus)
    print("## The beginnings of ten documents a domain, continued greedily\n")
    for domain in sorted(path.name for path in (arguments.corpus / "held_out").iterdir()):
        file = arguments.corpus / "held_out" / domain / "text.jsonl"
        texts = [json.loads(line)["text"] for line in head(file)]
        print_samples(domain, [beginning(models[0], text) for text in texts], models, CONTINUATION)
    print("## The first ten chats of each task, answered greedily\n")
    for task in sorted(path.name for path in (arguments.chats / "held_out").iterdir()):
        file = arguments.chats / "held_out" / task / "chats.jsonl"
        chats = [json.loads(line)["messages"] for line in head(file)]
        prompts = [as_typed(models[0].tokenizer, form(models[0], chat)) for chat in chats]
        print_samples(task, prompts, models, ANSWER)


def head(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()[:SAMPLES]


def beginning(model: Model, text: str) -> str:
    ids = model.tokenizer.encode(text)[:BEGINNING]
    return model.tokenizer.decode(ids, skip_special_tokens=False).rstrip("\ufffd")


def form(model: Model, chat: list[dict[str, str]]) -> str:
    return model.tokenizer.apply_chat_template(chat[:-1])


def print_losses(folders: tuple[Path, Path], corpus: Path) -> None:
    first, second = (held_out(folder, corpus) for folder in folders)
    print("## What held-out text costs\n")
    print("Bits a byte, nats a token in brackets.\n")
    print("| domain | first | second | less by |\n|---|---|---|---|")
    for domain, loss in second.loss.items():
        before, after = first.bits_per_byte[domain], second.bits_per_byte[domain]
        print(
            f"| {domain} | {before:.3f} ({first.loss[domain]:.3f}) | {after:.3f} ({loss:.3f}) "
            f"| {1 - after / before:.1%} |"
        )
    print()


def print_sums(models: tuple[Model, Model], corpus: Path) -> None:
    outcomes = [right_sums(model, corpus) for model in models]
    print("## Sums that were never asked in training\n")
    print("| kind | first | second |\n|---|---|---|")
    for kind, (first, second) in sorted((k, [o[k] for o in outcomes]) for k in outcomes[0]):
        print(f"| {kind} | {sum(first)} of {len(first)} | {sum(second)} of {len(second)} |")
    print()


def print_samples(
    name: str, prompts: list[str], models: tuple[Model, Model], max_tokens: int
) -> None:
    print(f"### {name}\n")
    made = [model.generate(prompts, max_tokens=max_tokens, temperature=0) for model in models]
    for number, prompt in enumerate(prompts):
        print(f"{number + 1}. {quoted(prompt)}")
        for edition, answers in zip(EDITIONS, made, strict=True):
            print(f"   - {edition}: {quoted(answers[number].text)}")
    print()


def quoted(text: str) -> str:
    """Put a text into one line of Markdown."""
    line = text.replace("`", "ˋ").replace("\n", " ⏎ ").strip()
    return f"`{line}`" if line else "(nothing)"


if __name__ == "__main__":
    main()
