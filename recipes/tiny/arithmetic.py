"""Small sums, worked out digit by digit between <think> and </think>."""

import hashlib
import random
from collections.abc import Iterator

PROMPTS = ("{}=?", "{} = ?", "{}", "What is {}?", "{}等于多少？", "计算：{}")


def problems(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (key, document) pairs; documents that ask the same thing share their key.

    The key ignores the wording of the question and the order of a sum's or product's operands,
    so a split by key never asks in training what is asked in the held-out part.
    """
    rng = random.Random(seed)
    for _ in range(count):
        expression, steps, answer = _draw(rng)
        prompt = rng.choices(PROMPTS, weights=(8, 2, 2, 1, 1, 1))[0]
        shown = expression.replace("*", "×") if rng.random() < 0.25 else expression
        yield (
            _key(expression),
            f"<｜User｜>{prompt.format(shown)}<｜Assistant｜>"
            f"<think>{chr(10).join(steps)}</think>{answer}",
        )


def is_held_out(key: str, share: float = 0.015) -> bool:
    """Tell by the key alone whether a problem belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64


def _key(expression: str) -> str:
    for operator in "+*":
        operands = expression.split(operator)
        if len(operands) == 2 and all(operand.isdigit() for operand in operands):
            return operator.join(sorted(operands))
    return expression


def _number(rng: random.Random, digits: tuple[int, ...] = (1, 2, 2, 3, 3)) -> int:
    size = rng.choice(digits)
    return rng.randint(10 ** (size - 1) if size > 1 else 0, 10**size - 1)


def _draw(rng: random.Random) -> tuple[str, list[str], int]:
    kind = rng.choices(("+", "-", "*1", "*2", "two"), weights=(30, 25, 20, 10, 15))[0]
    if kind == "+":
        a, b = _number(rng), _number(rng)
        return (f"{a}+{b}", *add(a, b))
    if kind == "-":
        a, b = _number(rng), _number(rng)
        if a < b and rng.random() < 0.7:
            a, b = b, a
        return (f"{a}-{b}", *subtract(a, b))
    if kind == "*1":
        a, b = _number(rng), _number(rng, (1,))
        if rng.random() < 0.3:
            a, b = b, a
        return (f"{a}*{b}", *multiply(a, b))
    if kind == "*2":
        a, b = _number(rng, (2,)), _number(rng, (2,))
        return (f"{a}*{b}", *multiply(a, b))
    return _two_steps(rng)


def _two_steps(rng: random.Random) -> tuple[str, list[str], int]:
    a, b = _number(rng, (1, 2, 2)), _number(rng, (1, 2, 2))
    c = _number(rng, (1,))
    shape = rng.choice(("a+b*c", "a*c+b", "(a+b)*c", "a+b-c", "a-c+b"))
    expression = shape.replace("a", str(a)).replace("b", str(b)).replace("c", str(c))
    if shape in ("a+b*c", "a*c+b"):
        steps, product = multiply(b if shape == "a+b*c" else a, c)
        rest = add(a, product) if shape == "a+b*c" else add(product, b)
    elif shape == "a-c+b":
        steps, first = subtract(a, c)
        rest = add(first, b) if first >= 0 else subtract(b, -first)
    else:
        steps, first = add(a, b)
        rest = multiply(first, c) if shape == "(a+b)*c" else subtract(first, c)
    return expression, steps + rest[0], rest[1]


def add(a: int, b: int) -> tuple[list[str], int]:
    """Return the lines of a column addition, lowest digit first, and the sum."""
    lines, carry = [], 0
    if max(a, b) > 9:
        first, second = _columns(a, b)
        for i, (x, y) in enumerate(zip(first, second, strict=True)):
            total = x + y + carry
            line = f"{x}+{y}{f'+{carry}' if carry else ''}={total}"
            carry, digit = divmod(total, 10)
            if i + 1 < len(first):
                line += f" write {digit}" + (f" carry {carry}" if carry else "")
            lines.append(line)
    return [*lines, f"{a}+{b}={a + b}"], a + b


def subtract(a: int, b: int) -> tuple[list[str], int]:
    """Return the lines of a column subtraction, lowest digit first, and the difference."""
    if a < b:
        lines, difference = subtract(b, a)
        return [f"{a}<{b} negative", *lines, f"{a}-{b}={-difference}"], -difference
    lines, borrow = [], 0
    if a > 9:
        for x, y in zip(*_columns(a, b), strict=True):
            taken = f"-{borrow}" if borrow else ""
            digit = x - borrow - y
            borrow = int(digit < 0)
            if borrow:
                lines.append(f"1{x}{taken}-{y}={digit + 10} borrow 1")
            else:
                lines.append(f"{x}{taken}-{y}={digit}")
    return [*lines, f"{a}-{b}={a - b}"], a - b


def multiply(a: int, b: int) -> tuple[list[str], int]:
    """Return the lines of a written multiplication and the product; one operand has <= 2 digits."""
    if a < 10 <= b:
        lines, product = multiply(b, a)
        return [*lines, f"{a}*{b}={product}"], product
    if b < 10:
        lines, carry = [], 0
        digits = _digits(a)
        if len(digits) > 1:
            for i, x in enumerate(digits):
                total = x * b + carry
                line = f"{x}*{b}{f'+{carry}' if carry else ''}={total}"
                carry, digit = divmod(total, 10)
                if i + 1 < len(digits):
                    line += f" write {digit}" + (f" carry {carry}" if carry else "")
                lines.append(line)
        return [*lines, f"{a}*{b}={a * b}"], a * b
    tens, ones = divmod(b, 10)
    low_lines, low = multiply(a, ones)
    high_lines, high = multiply(a, tens)
    sum_lines, product = add(low, high * 10)
    lines = [*low_lines, *high_lines, f"{a}*{tens * 10}={high * 10}", *sum_lines]
    return [*lines, f"{a}*{b}={product}"], product


def _digits(number: int) -> list[int]:
    return [int(digit) for digit in reversed(str(number))]


def _columns(a: int, b: int) -> tuple[list[int], list[int]]:
    first, second = _digits(a), _digits(b)
    width = max(len(first), len(second))
    return first + [0] * (width - len(first)), second + [0] * (width - len(second))
