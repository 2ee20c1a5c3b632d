"""Sums of two numbers of 1 to 4 digits; those of 4 digits are longer than any that was taught."""

import random

from moescope.training.rl.tasks import Problem


def sample(rng: random.Random) -> Problem:
    digits = rng.randint(1, 4)
    first, second = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    answer = str(first + second)

    def reward(text: str) -> float:
        return float(text.rpartition("</think>")[2].strip() == answer)

    return Problem(f"{first}+{second}=?", reward, level=digits)
