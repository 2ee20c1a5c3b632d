"""Make a number from 2 to 4 others with + - *, each used once; the level is how many.

Any expression that comes to the number is right. It is read as Python reads it and computed here,
number by number; nothing of an answer is executed.
"""

import ast
import operator
import random
from collections.abc import Callable

from moescope.training.rl.tasks import Problem, graded

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
LONGEST = 60
"""Characters of an expression that is read."""


def sample(rng: random.Random) -> Problem:
    count = rng.randint(2, 4)
    numbers = [rng.randint(1, 12) for _ in range(count)]
    goal = numbers[0]
    for number in numbers[1:]:
        goal = rng.choice(list(OPERATORS.values()))(goal, number)
    shown = list(numbers)
    rng.shuffle(shown)
    return Problem(
        f"make {goal} from {' '.join(map(str, shown))}",
        lambda text: graded(text, lambda a: comes_to(a, goal, shown)),
        level=count,
    )


def comes_to(expression: str, goal: int, numbers: list[int]) -> bool:
    """Whether an expression uses each of the numbers once, no other, and comes to the goal."""
    if len(expression) > LONGEST:
        return False
    used: list[int] = []
    try:
        return _value(ast.parse(expression, mode="eval").body, used) == goal and sorted(
            used
        ) == sorted(numbers)
    except (SyntaxError, ValueError):
        return False


def _value(node: ast.expr, used: list[int]) -> int:
    match node:
        case ast.Constant(value=int(number)) if type(number) is int:
            used.append(number)
            return number
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, used), _value(right, used))
        case _:
            raise ValueError("what may stand in an expression are numbers, + - * and brackets")
