"""Which of two numbers is larger? They share all digits before a place: the level is that place."""

import random

from moescope.training.rl.tasks import Problem, graded

DIGITS = 5


def sample(rng: random.Random) -> Problem:
    place = rng.randint(1, DIGITS)
    same = "".join(rng.choice("123456789") for _ in range(place - 1))
    low, high = sorted(rng.sample("123456789", 2))
    rest = ["".join(rng.choice("0123456789") for _ in range(DIGITS - place)) for _ in range(2)]
    smaller, larger = same + low + rest[0], same + high + rest[1]
    shown = [smaller, larger]
    rng.shuffle(shown)
    return Problem(
        f"larger: {shown[0]} or {shown[1]}?",
        lambda text: graded(text, lambda a: a == larger),
        level=place,
    )
