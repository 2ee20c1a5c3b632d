"""Sums of two numbers of 1 to 4 digits; those of 4 digits are longer than any in the text."""

import random

from moescope.training.rl.tasks import Problem, graded

MOST_DIGITS = 4


def sample(rng: random.Random) -> Problem:
    digits = rng.randint(1, MOST_DIGITS)
    first, second = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    right = str(first + second)
    return Problem(
        f"{first}+{second}=?", lambda text: graded(text, lambda a: a == right), level=digits
    )
