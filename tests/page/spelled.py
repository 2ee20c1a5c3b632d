"""Numbers as the page writes them, and as they are read off it again."""

import re
from decimal import ROUND_HALF_UP, Decimal

TEXTS = """(node) => {
  const copy = node.cloneNode(true);
  const controls = '.controls, .save, .visually-hidden, [data-unsaved], button';
  const apart = copy.querySelectorAll(`${controls}, .ordinal, title, .tick`);
  apart.forEach((part) => part.remove());
  const walker = document.createTreeWalker(copy, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode.data.trim());
  return texts.filter(Boolean);
}"""
"""The texts of an element one by one, without its controls and the ticks of its axes."""
NUMBER = re.compile(
    r"(?<![A-Za-z\d.,-])\d+(?:,\d{3})*(?:\.\d+)?(?:\s?(?:%|[KMGT]B|[KMBT]|万亿|万|亿)(?![A-Za-z]))?"
)


def numbers(section) -> set[str]:
    """Every number that an element tells, with its unit; names such as H100 are none."""
    texts: list[str] = section.evaluate(TEXTS)
    return {re.sub(r"\s", "", found) for text in texts for found in NUMBER.findall(text)}


def number(value: float, digits: int = 2) -> str:
    """A number with at most so many decimals."""
    exact = Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    whole, _, decimals = f"{exact:,}".partition(".")
    return f"{whole}.{decimals.rstrip('0')}".rstrip(".")


def significant(value: float, digits: int) -> str:
    """A number with at most so many digits that tell something."""
    exact = Decimal(repr(value))
    return number(value, max(0, digits - 1 - exact.adjusted()))


def percent(share: float) -> str:
    """A share."""
    if share < 0.0995:
        return significant(100 * share, 2) + "%"
    return number(100 * share, 0) + "%"


def count(value: float, language: str) -> str:
    """A large number in few characters."""
    units = {
        "en": [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")],
        "zh": [(1e12, "万亿"), (1e8, "亿"), (1e4, "万")],
    }[language]
    size, unit = next(((size, unit) for size, unit in units if value >= size), (1.0, ""))
    scaled = float(f"{value / size:.3g}")
    return significant(scaled, 3).replace(",", "") + unit


def bytes_of(value: float) -> str:
    """An amount of memory."""
    amount, units = value / 1e3, ["KB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return number(amount, 1 if amount < 10 else 0) + units[0]
