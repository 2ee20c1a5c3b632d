"""Problems whose answers a program can check, as small Python files set them.

import random
from moescope.training.rl.tasks import Problem, graded

def sample(rng: random.Random) -> Problem:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return Problem(f"{a}+{b}=?", lambda text: graded(text, lambda answer: answer == str(a + b)))
"""

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from moescope.engine.thinking import BEGIN, END
from moescope.errors import UserError

FORM = 0.1
"""What an answer of the right form is worth that is wrong (R1-Zero's reward for the form)."""
PREFIX = "moescope_task_"


@dataclass(frozen=True)
class Problem:
    """A question, and what an answer to it is worth.

    Attributes:
        question: put to the model as a chat's first message.
        reward: maps the text of an answer, special tokens spelled out, to its worth; 1 is right.
        level: how hard it is, by which accuracy is told apart; digits of a sum, for example.
        task: the file that set it, without its ending.
    """

    question: str
    reward: Callable[[str], float]
    level: int = 0
    task: str = ""


def graded(text: str, is_right: Callable[[str], bool]) -> float:
    """Return 1 for a right answer, `FORM` for a wrong one behind one thought, else 0.

    What counts is what stands behind the thought, or the whole text where there is none.
    """
    thought, ended, answer = text.rpartition(END)
    if is_right(answer.strip()):
        return 1.0
    begun = thought.startswith(BEGIN) and thought.count(BEGIN) == 1 and END not in thought
    return FORM if begun and ended and answer.strip() else 0.0


class Tasks:
    """The `sample` functions of several files.

    Raises:
        UserError: a file is missing, is no Python, or has no `sample`.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._modules = [_module(file) for file in files]

    def draw(self, rng: random.Random) -> Problem:
        """Set a problem of one of the tasks, each as likely."""
        module = rng.choice(self._modules)
        problem = module.sample(rng)
        if not isinstance(problem, Problem):
            raise UserError(f"{module.__file__}: sample(rng) returned no Problem but {problem!r}")
        return replace(problem, task=module.__name__.removeprefix(PREFIX))


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(PREFIX + file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"[rl] names the task {file}, but there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the task {file} cannot be loaded: {error!r}") from error
    if not callable(getattr(module, "sample", None)):
        raise UserError(f"the task {file} has no function sample(rng); see moescope.training.rl")
    return module
