"""The history of reinforcement in the box: whole, and true to the tasks that it was made with."""

import importlib.util
import random
import re
from pathlib import Path

import pytest

from moescope.scope.reasoning import FILE, ReasoningHistory
from moescope.training.rl.tasks import graded

RECIPES = Path(__file__).parents[2] / "recipes/reason"


@pytest.fixture(scope="module")
def history() -> ReasoningHistory:
    return ReasoningHistory.from_file(FILE)


def right_answer(question: str) -> str:
    if sum_ := re.fullmatch(r"(\d+)\+(\d+)=\?", question):
        return str(int(sum_[1]) + int(sum_[2]))
    letters = re.fullmatch(r"(\w) in (\w+)\?", question)
    assert letters is not None, question
    return str(letters[2].count(letters[1]))


def test_every_answer_has_the_reward_that_its_question_gives(history: ReasoningHistory) -> None:
    assert len(history.questions) == 40
    for run in history.runs:
        for snapshot in run.snapshots:
            assert len(snapshot.answers) == len(history.questions)
            for question, answer in zip(history.questions, snapshot.answers, strict=True):
                right = right_answer(question.text)
                assert answer.reward == graded(answer.text, right.__eq__)


def test_every_token_that_was_read_visited_its_experts(history: ReasoningHistory) -> None:
    """Begin, roles, the question and all of the answer but its last token, in each layer."""
    for run in history.runs:
        for snapshot in run.snapshots:
            for question, answer in zip(history.questions, snapshot.answers, strict=True):
                read = 3 + len(question.text) + answer.tokens - 1
                assert [sum(counts) for counts in answer.experts] == [2 * read] * 2


def test_a_run_begins_before_its_first_step_and_ends_with_its_last(
    history: ReasoningHistory,
) -> None:
    assert [run.name for run in history.runs] == ["zero", "cold"]
    for run in history.runs:
        assert [step.step for step in run.steps] == list(range(1, len(run.steps) + 1))
        assert run.snapshots[0].step == 0 and run.snapshots[-1].step == len(run.steps)
    assert history.stages[0].name == "base" and history.active < history.parameters


@pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes are in a checkout only")
def test_the_questions_are_those_of_the_recipes(history: ReasoningHistory) -> None:
    for question in history.questions:
        spec = importlib.util.spec_from_file_location("task", RECIPES / f"{question.task}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        levels = {module.sample(random.Random(seed)).level for seed in range(200)}
        assert question.level in levels
