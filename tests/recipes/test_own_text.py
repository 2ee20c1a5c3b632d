"""What is written for tiny's recipe itself: questions about models, and arithmetic."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny"))

import arithmetic
import gather
import sources

from moescope.catalog import catalog
from moescope.model.costs import count_parameters

OWN_ENTRIES = [
    json.loads(line)
    for path in sorted(gather.OWN.glob("*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()
]


def test_our_own_text_repeats_no_question_and_holds_out_some() -> None:
    questions = [question for entry in OWN_ENTRIES for question in entry["questions"]]
    answers = [entry["answer"] for entry in OWN_ENTRIES]
    assert len(questions) == len(set(questions)) > 400
    assert len(answers) == len(set(answers)) > 170
    chinese = [answer for answer in answers if re.search("[一-鿿]", answer)]
    assert 0.4 < len(chinese) / len(answers) < 0.6
    assert all(20 <= len(answer.encode()) <= 600 for answer in answers)
    train, held_out = gather.models()
    assert len(held_out) > 20
    assert not set(train) & set(held_out)
    told = {chat.partition("<｜Assistant｜>")[2] for chat in train}
    assert told == set(answers)  # every answer is learned, by another wording of its question


def test_common_words_and_tales_are_whole_and_each_there_once() -> None:
    words = sources.own_words(gather.OWN)
    chinese, english = [pair[0] for pair in words], [pair[1][0] for pair in words]
    assert len(set(chinese)) == len(set(english)) == len(words) > 300
    assert all(re.fullmatch("[一-鿿]+", one) for one in chinese)
    assert all(re.fullmatch("[A-Za-z]+( [A-Za-z]+)*", one) for one in english)
    tales = sources.own_tales(gather.OWN)
    assert len(set(tales)) == len(tales) > 10
    assert all(tale[-1] in '.”。"' for tale in tales)


def test_books_begin_with_whole_sentences_and_without_a_heading() -> None:
    long = "It is so, said Mr. Hill. " * 100
    chapters = [f"CHAPTER I\n\n\n{long}", f"Genesis, chapter 1\n\n{long}", f"CHAPTER II\n{long}"]
    openings = list(sources.openings([*chapters, "Chapter 1\n\nnothing that ends"]))
    assert openings == [("It is so, said Mr. Hill. " * 60).strip()] * 2


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("deepseek-v3", {"layers": 61, "dense": 3, "experts": 256, "chosen": 8, "shared": 1}),
        ("deepseek-v2", {"layers": 60, "dense": 1, "experts": 160, "chosen": 6, "shared": 2}),
        ("deepseek-v2-lite", {"layers": 27, "dense": 1, "experts": 64, "chosen": 6, "shared": 2}),
    ],
)
def test_what_our_own_text_says_of_published_models_is_their_config(
    name: str, facts: dict[str, int]
) -> None:
    config = catalog()[name].config
    assert facts == {
        "layers": config.num_hidden_layers,
        "dense": config.first_k_dense_replace,
        "experts": config.n_routed_experts,
        "chosen": config.num_experts_per_tok,
        "shared": config.n_shared_experts,
    }
    text = " ".join(entry["answer"] for entry in OWN_ENTRIES)
    for number in (facts["experts"],):
        assert f"{number} routed" in text and f"{number} 个路由专家" in text
    counts = count_parameters(config)
    in_words = {"deepseek-v3": "671 billion", "deepseek-v2": "236 billion"}
    if name in in_words:
        assert in_words[name] in text
        assert round(counts.total / 1e9) == int(in_words[name].split()[0])
        chinese = f"{round(counts.total / 1e9)}0 亿"  # one billion is ten of them
        assert chinese in text


# --- arithmetic --------------------------------------------------------------------------------


def answers_are_right(document: str) -> None:
    expression = re.sub(r"[^\d+\-*()]", "", document.split("<｜Assistant｜>")[0].replace("×", "*"))
    steps, answer = document.split("<think>")[1].split("</think>")
    value = eval(expression)  # digits and operators only
    assert int(answer) == value
    assert steps.split("\n")[-1].endswith(f"={answer}")
    for line in steps.split("\n"):
        if "=" not in line:
            left, right = re.fullmatch(r"(\d+)<(\d+) negative", line).groups()
            assert int(left) < int(right)
            continue
        left, right = line.split("=")
        result, *notes = right.split(" ")
        assert eval(left) == int(result)
        if "write" in notes:
            assert notes[1] == result[-1]
        if "carry" in notes:
            assert notes[-1] == result[:-1]


@given(seed=st.integers(0, 2**32))
def test_every_line_of_a_worked_problem_is_true(seed: int) -> None:
    for _, document in arithmetic.problems(5, seed):
        answers_are_right(document)


@given(a=st.integers(0, 9999), b=st.integers(0, 999), c=st.integers(0, 99))
def test_columns(a: int, b: int, c: int) -> None:
    for expression, (steps, answer) in {
        f"{a}+{b}": arithmetic.add(a, b),
        f"{a}-{b}": arithmetic.subtract(a, b),
        f"{b}*{c}": arithmetic.multiply(b, c),
    }.items():
        answers_are_right(
            f"{expression}<｜Assistant｜><think>{chr(10).join(steps)}</think>{answer}"
        )


def test_held_out_problems_are_never_trained_on() -> None:
    train, held_out = gather.arithmetic_split(20_000, seed=5)

    def asked(document: str) -> str:
        text = document.split("<｜Assistant｜>")[0].replace("×", "*")
        return re.sub(r"[^\d+\-*()]", "", text)

    known = {asked(document) for document in train}
    assert 0.01 < len(held_out) / len(train) < 0.02
    assert not known & {asked(document) for document in held_out}
    for document in held_out:
        operands = re.fullmatch(r"(\d+)([+*])(\d+)", asked(document))
        assert operands is None or f"{operands[3]}{operands[2]}{operands[1]}" not in known
