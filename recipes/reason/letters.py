"""How often is a letter in a word? The level is half the word's length, rounded down: 1 to 4.

Words of 7 letters and more are longer than any in the text.
"""

import random

from moescope.training.rl.tasks import Problem, graded

LETTERS = "aeinrst"
SHORTEST, LONGEST = 2, 9


def word_of(rng: random.Random, length: int) -> tuple[str, str]:
    """Return a letter, and a word in which about every third letter is that one."""
    letter = rng.choice(LETTERS)
    spelled = (letter if rng.random() < 0.2 else rng.choice(LETTERS) for _ in range(length))
    return letter, "".join(spelled)


def sample(rng: random.Random) -> Problem:
    length = rng.randint(SHORTEST, LONGEST)
    letter, word = word_of(rng, length)
    right = str(word.count(letter))
    return Problem(
        f"{letter} in {word}?", lambda text: graded(text, lambda a: a == right), level=length // 2
    )
