"""A number of 1 to 4 digits times one of a single digit."""

import random

from moescope.training.rl.tasks import Problem, graded


def sample(rng: random.Random) -> Problem:
    digits = rng.randint(1, 4)
    first, second = rng.randint(10 ** (digits - 1), 10**digits - 1), rng.randint(2, 9)
    right = str(first * second)
    return Problem(
        f"{first}*{second}=?", lambda text: graded(text, lambda a: a == right), level=digits
    )
