"""What the site does to pages before and after Markdown: a hook of `mkdocs.yml`."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.S)
WRAPPED = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) *\n *(?=[\u3000-\u9fff\uff00-\uffef])")

logging.getLogger("jieba").setLevel(logging.WARNING)  # it cuts Chinese into words for the search


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Join wrapped lines of Chinese, which a browser would show with a gap."""
    return WRAPPED.sub("", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX that `pymdownx.arithmatex` marked into MathML, which browsers show."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula
