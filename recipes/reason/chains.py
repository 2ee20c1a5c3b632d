"""Ways to work a problem out, as people write them down: good ones, poor ones, and none."""

import random
from collections.abc import Callable
from itertools import zip_longest

Worked = tuple[str, str]  # a thought and the answer behind it
MUSINGS = ("hm", "let me see", "well", "i think", "ok so")


# --- sums -----------------------------------------------------------------------------------------


def columns(first: int, second: int) -> Worked:
    """Digit by digit from the right, with the carry: always right."""
    lines, carry = [], 0
    for a, b in _columns(first, second):
        total = a + b + carry
        lines.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return "\n".join(lines), str(first + second)


def careless(first: int, second: int, rng: random.Random) -> Worked:
    """The same with carries forgotten, half of them: wrong wherever one was."""
    lines, digits, carry = [], [], 0
    for a, b in _columns(first, second):
        total = a + b + carry
        lines.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        digits.append(total % 10)
        carry = total // 10 if rng.random() < 0.5 else 0
    if carry:
        digits.append(carry)
    return "\n".join(lines), "".join(str(digit) for digit in reversed(digits))


def from_the_left(first: int, second: int) -> Worked:
    """The columns in the order of reading: the carries are left to the answer."""
    lines = [f"{a}+{b}={a + b}" for a, b in reversed(_columns(first, second))]
    return "\n".join(lines), str(first + second)


def _columns(first: int, second: int) -> list[tuple[int, int]]:
    """Digits that stand above each other, ones first."""
    digits = ([int(d) for d in reversed(str(number))] for number in (first, second))
    return list(zip_longest(*digits, fillvalue=0))


# --- letters --------------------------------------------------------------------------------------


def tally(letter: str, word: str) -> Worked:
    """Spell the word and count along: always right."""
    said, count = "", 0
    for own in word:
        count += own == letter
        said += f"{own}{count}"
    return said, str(count)


def careless_tally(letter: str, word: str, rng: random.Random) -> Worked:
    """The same, where every fourth letter is passed over."""
    return tally(letter, "".join(own for own in word if rng.random() < 0.75))


def spelled(letter: str, word: str) -> Worked:
    """Spell the word, and count in the head."""
    return " ".join(word), str(word.count(letter))


# --- both -----------------------------------------------------------------------------------------


def written(worked: Worked) -> str:
    """Write an answer in the form in which it is asked for."""
    thought, answer = worked
    return f"<think>{thought}</think>{answer}"


def some_way(rng: random.Random, right: str, ways: dict[Callable[[], Worked], float]) -> str:
    """Write an answer as texts have it: often without a thought, seldom by the best way.

    Args:
        rng: draws.
        right: the answer.
        ways: of thinking, each with its weight.
    """
    form = rng.random()
    if form < 0.10:
        return right  # no place for a thought at all
    if form < 0.40:
        return written(("", right))
    if form < 0.46:
        return written((rng.choice(MUSINGS), right))
    (way,) = rng.choices(list(ways), weights=list(ways.values()))
    return written(way())


def a_sum(first: int, second: int, rng: random.Random) -> str:
    """Answer a sum in one of the ways."""
    ways: dict[Callable[[], Worked], float] = {
        lambda: columns(first, second): 1,
        lambda: from_the_left(first, second): 1,
        lambda: careless(first, second, rng): 1,
    }
    return some_way(rng, str(first + second), ways)


def a_count(letter: str, word: str, rng: random.Random) -> str:
    """Answer how often a letter is in a word, in one of the ways."""
    ways: dict[Callable[[], Worked], float] = {
        lambda: tally(letter, word): 1,
        lambda: spelled(letter, word): 1,
        lambda: careless_tally(letter, word, rng): 1,
    }
    return some_way(rng, str(word.count(letter)), ways)
