"""Put 2 to 6 numbers in ascending order; the level is how many."""

import random

from moescope.training.rl.tasks import Problem, graded


def sample(rng: random.Random) -> Problem:
    count = rng.randint(2, 6)
    numbers = rng.sample(range(1, 100), count)
    right = sorted(numbers)
    return Problem(
        f"sort {' '.join(map(str, numbers))}",
        lambda text: graded(text, lambda a: a.split() == [str(n) for n in right]),
        level=count,
    )
