"""Ask a model the same problems many times: `python recipes/reason/measure.py MODEL --out FILE`.

For each task and level: how often one answer is right and how often one of 16 is (pass@1, pass@16),
how long the thoughts are, and whether thinking pays: beside it stand answers at once, by as many
votes as the tokens of a thought would buy. Also who served which task, and how evenly. Problems
are drawn from a seed of their own: of sums of one digit and of short words a training meets all
there are, of the others hardly one of these.
"""

import argparse
import json
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import moescope
from moescope.scope.information import mutual_information
from moescope.training.rl.sampler import Answer, draw_answers
from moescope.training.rl.tasks import Problem, Tasks

HERE = Path(__file__).parent
PROBLEMS, SAMPLES, MOST_VOTES = 16, 16, 32
"""Problems of each level, answers to each, and votes that are counted at most."""
MAX_TOKENS = 48
AT_ONCE = 256
SEED = "measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chains", type=Path, help="write right answers as chats, for fine-tuning")
    parser.add_argument("--chats", type=int, default=3000, help="problems asked for those")
    arguments = parser.parse_args()
    model = moescope.load(str(arguments.model), quantize="int8", backend="cpu")
    if arguments.chains:
        write_chains(model, arguments.chains, arguments.chats)
        return
    problems = problems_of(HERE)
    thought = asked(model, problems, SAMPLES, opening="")
    at_once = asked(model, problems, MOST_VOTES, opening="<think></think>")
    found = {
        "levels": levels(problems, thought, at_once),
        "experts": experts(problems, thought, model.config.n_routed_experts or 0),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def problems_of(folder: Path) -> list[Problem]:
    """Return as many problems of each task and level, always the same."""
    kept: dict[tuple[str, int], list[Problem]] = defaultdict(list)
    tasks, rng = Tasks([folder / "sums.py", folder / "letters.py"]), random.Random(SEED)
    for _ in range(4000):
        problem = tasks.draw(rng)
        if len(kept[problem.task, problem.level]) < PROBLEMS:
            kept[problem.task, problem.level].append(problem)
    return [problem for _, of in sorted(kept.items()) for problem in of]


def asked(
    model: Any, problems: Sequence[Problem], samples: int, *, opening: str
) -> list[list[Answer]]:
    """Return `samples` answers to each problem, drawn as they are while learning."""
    prompts = [
        model.tokenizer.encode(
            model.tokenizer.apply_chat_template([{"role": "user", "content": problem.question}])
            + opening
        )
        for problem in problems
        for _ in range(samples)
    ]
    answers: list[Answer] = []
    for at in range(0, len(prompts), AT_ONCE):
        batch = prompts[at : at + AT_ONCE]
        seeds = list(range(at, at + len(batch)))
        answers += draw_answers(
            model.network, model.tokenizer, batch, seeds, max_tokens=MAX_TOKENS, temperature=1.0
        )
    return [answers[at : at + samples] for at in range(0, len(answers), samples)]


def levels(
    problems: Sequence[Problem],
    thought: Sequence[Sequence[Answer]],
    at_once: Sequence[Sequence[Answer]],
) -> dict[str, dict[str, float]]:
    """Return what is told of each task and level: shares of 1, and tokens."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for problem, own, direct in zip(problems, thought, at_once, strict=True):
        right = [problem.reward(answer.text) >= 1 for answer in own]
        tokens = statistics.fmean(len(answer.ids) for answer in own)
        votes = min(
            max(1, round(tokens / statistics.fmean(len(a.ids) for a in direct))), MOST_VOTES
        )
        rows[f"{problem.task} {problem.level}"].append(
            {
                "pass@1": statistics.fmean(right),
                "pass@16": float(any(right)),
                "tokens": tokens,
                "thinks": statistics.fmean(
                    "<think></think>" not in a.text and "</think>" in a.text for a in own
                ),
                "at_once": statistics.fmean(problem.reward(a.text) >= 1 for a in direct),
                "voted": voted(problem, [a.text for a in direct], votes),
                "votes": votes,
            }
        )
    return {
        level: {name: statistics.fmean(row[name] for row in own) for name in own[0]}
        for level, own in rows.items()
    }


def voted(problem: Problem, texts: Sequence[str], votes: int) -> float:
    """How often the answer that most of `votes` texts give is right, over disjoint ballots."""
    ballots = [texts[at : at + votes] for at in range(0, len(texts) - votes + 1, votes)]
    winners = [Counter(ballot).most_common(1)[0][0] for ballot in ballots]
    return statistics.fmean(problem.reward(winner) >= 1 for winner in winners)


def experts(
    problems: Sequence[Problem], thought: Sequence[Sequence[Answer]], count: int
) -> dict[str, Any]:
    """Return for each layer the busiest expert's surplus and the bits that experts tell of tasks.

    An expert's surplus is over an even share; each is measured over the tokens of all answers.
    """
    tasks = sorted({problem.task for problem in problems})
    counts: dict[int, Any] = {}
    for problem, own in zip(problems, thought, strict=True):
        for answer in own:
            for layer, chosen in answer.choices.items():
                table = counts.setdefault(layer, np.zeros((len(tasks), count), np.int64))
                served = chosen.flatten().bincount(minlength=count)
                table[tasks.index(problem.task)] += served.numpy()
    return {
        str(layer): {
            "violation": float(table.sum(0).max() / table.sum() * count - 1),
            "bits": float(mutual_information(table)),
        }
        for layer, table in counts.items()
    }


def write_chains(model: Any, out: Path, count: int) -> None:
    """Ask `count` new problems once, and write the right answers as chats."""
    tasks, rng = Tasks([HERE / "sums.py", HERE / "letters.py"]), random.Random("chains")
    problems = [tasks.draw(rng) for _ in range(count)]
    right = [
        (problem.question, answer.text)
        for problem, (answer,) in zip(problems, asked(model, problems, 1, opening=""), strict=True)
        if problem.reward(answer.text) >= 1
    ]
    held_out = len(right) // 20
    for part, chats in (("held_out", right[:held_out]), ("train", right[held_out:])):
        file = out / part / "chains" / "chats.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": text},
                    ]
                }
            )
            for question, text in chats
        )
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(right)} of {count} answers were right")


if __name__ == "__main__":
    main()
