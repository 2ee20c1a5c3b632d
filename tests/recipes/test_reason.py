"""The small tasks of reinforcement, what they reward, and the text that is made for their model."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "reason"))

import chains
import countdown
import letters
import text

from moescope.training.rl.tasks import FORM, Problem, Tasks, graded

RECIPES = Path(text.__file__).parent
SOLVERS: dict[str, Callable[[str], str]] = {
    "sums": lambda asked: str(sum(int(n) for n in asked.removesuffix("=?").split("+"))),
    "products": lambda asked: str(eval(asked.removesuffix("=?"))),
    "letters": lambda asked: str(asked[5:-1].count(asked[0])),
    "comparison": lambda asked: str(max(int(n) for n in asked[8:-1].split(" or "))),
    "sorting": lambda asked: " ".join(sorted(asked.split()[1:], key=int)),
}


def drawn(task: str, count: int = 300) -> list[Problem]:
    tasks, rng = Tasks([RECIPES / f"{task}.py"]), random.Random(5)
    return [tasks.draw(rng) for _ in range(count)]


@pytest.mark.parametrize("task", SOLVERS)
def test_the_right_answer_is_rewarded_and_no_other(task: str) -> None:
    for problem in drawn(task):
        right = SOLVERS[task](problem.question)
        assert problem.task == task
        assert problem.reward(right) == problem.reward(f" {right}\n") == 1
        assert problem.reward(f"<think>1</think>{right}") == 1
        assert problem.reward(f"<think>{right}</think>0{right}") == FORM
        assert problem.reward(f"{right}{right}") == problem.reward("") == 0
        assert problem.reward(f"<think>{right}") == 0


@pytest.mark.parametrize("task", [*SOLVERS, "countdown"])
def test_every_level_is_drawn(task: str) -> None:
    found = {problem.level for problem in drawn(task)}
    assert found == set(range(min(found), max(found) + 1))
    assert len(found) >= 3


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("(3+5)*2", 1),
        ("2*(5+3)", 1),
        (" 3*2+5*2 ", 0),  # 2 twice
        ("8*2", 0),  # 8 is none of them
        ("3*5+2", 0),  # another number
        ("16", 0),
        ("(3+5)*2**1", 0),
        ("__import__('os').getpid()", 0),
        ("True*16", 0),
        ("3+5", 0),
        ("((((" * 30, 0),
        ("<think>hm</think>(3+5)*2", 1),
        ("<think>hm</think>3*5", FORM),
    ],
)
def test_countdown_by_hand(answer: str, worth: float) -> None:
    def reward(text: str) -> float:
        return graded(text, lambda a: countdown.comes_to(a, 16, [2, 3, 5]))

    assert reward(answer) == worth


def test_every_countdown_can_be_solved() -> None:
    for problem in drawn("countdown", 40):
        goal, _, shown = problem.question.removeprefix("make ").partition(" from ")
        numbers = [int(n) for n in shown.split()]
        assert any(
            countdown.comes_to(written, int(goal), numbers) for written in written_ways(numbers)
        )


def written_ways(numbers: list[int]) -> list[str]:
    """Every expression that is computed from the left, over every order of the numbers."""
    if len(numbers) == 1:
        return [str(numbers[0])]
    ways: list[str] = []
    for at, last in enumerate(numbers):
        rest = numbers[:at] + numbers[at + 1 :]
        ways += [f"({way}){op}{last}" for way in written_ways(rest) for op in "+-*"]
    return ways


@pytest.mark.parametrize(
    ("told", "worth"),
    [
        ("<think>a</think>7", 1),
        ("<think></think>8", FORM),
        ("<think>a</think>", 0),
        ("a</think>8", 0),
        ("<think><think>a</think>8", 0),
        ("<think>a</think></think>8", 0),
        ("a<think>b</think>8", 0),
        ("8", 0),
    ],
)
def test_the_form_is_one_thought_and_an_answer(told: str, worth: float) -> None:
    assert graded(told, lambda answer: answer == "7") == worth


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_columns_carry_as_on_paper(first: int, second: int) -> None:
    thought, answer = chains.columns(first, second)
    assert answer == str(first + second)
    lines = thought.split("\n")
    assert all(eval(left) == int(right) for left, right in (line.split("=") for line in lines))
    made = "".join(line[-1] for line in reversed(lines))
    carry = lines[-1].partition("=")[2][:-1]
    assert f"{carry}{made}" == answer


@given(st.integers(1, 9999), st.integers(1, 9999), st.integers(0, 99))
def test_only_the_careless_way_of_a_sum_is_wrong(first: int, second: int, seed: int) -> None:
    right = str(first + second)
    assert chains.from_the_left(first, second)[1] == right
    assert len(chains.careless(first, second, random.Random(seed))[1]) <= len(right)


def test_a_tally_counts_along() -> None:
    assert chains.tally("e", "tree") == ("t0r0e1e2", "2")
    worked = [chains.careless_tally("e", "eeeeeeee", random.Random(seed)) for seed in range(20)]
    assert {len(thought) // 2 == int(answer) for thought, answer in worked} == {True}
    assert min(int(answer) for _, answer in worked) < 8


def test_the_text_has_good_ways_and_poor_ones_and_the_cold_start_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "DOCUMENTS", {"train": 400, "held_out": 20})
    monkeypatch.setattr(sys, "argv", ["text.py", "--out", str(tmp_path)])
    text.main()
    for task in ("sums", "letters"):
        file = tmp_path / "text/train" / task / "text.jsonl"
        told = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        assert len(told) == 400
        worth: list[float] = []
        for document in told:
            asked, _, answer = document.removeprefix("<｜User｜>").partition("<｜Assistant｜>")
            worth.append(graded(answer, SOLVERS[task](asked).__eq__))
        assert 0.85 < sum(w == 1 for w in worth) / len(worth) < 1
        assert 0.2 < sum("<think></think>" in document for document in told) / len(told) < 0.4
        chats = (tmp_path / "cold/train" / task / "chats.jsonl").read_text().splitlines()
        assert len(chats) == text.COLD["train"]
        for line in chats:
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            assert graded(answer, SOLVERS[task](question).__eq__) == 1
            assert answer.startswith("<think>") and "<think></think>" not in answer


def test_words_have_the_letter_that_is_asked_for_often_enough() -> None:
    rng = random.Random(1)
    counts = [word.count(letter) for letter, word in (letters.word_of(rng, 9) for _ in range(500))]
    assert 2 < sum(counts) / len(counts) < 3.5
