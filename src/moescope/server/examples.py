"""Texts to begin with, one click away."""

from moescope.server.schema import Example
from moescope.text.tokenizer import Tokenizer

TEXTS = (
    Example(domain="poetry", language="zh", text="床前明月光，疑是地上"),
    Example(domain="poetry", language="zh", text="《春晓》\n唐·孟浩然\n春眠不觉晓，"),
    Example(
        domain="prose",
        language="en",
        text="It is a truth universally acknowledged, that a single man",
    ),
    Example(domain="code", language="en", text="def read_lines(path):\n    with open(path) as"),
)
QUESTIONS = (
    Example(domain="translation", language="zh", text="翻译成中文：moonlight"),
    Example(domain="translation", language="en", text="Translate into English: 月光"),
    Example(domain="arithmetic", language="en", text="17+25=?"),
    Example(domain="arithmetic", language="zh", text="12+7等于多少？"),
)
"""Asked in the model's own chat form, where it has one."""


def examples(tokenizer: Tokenizer) -> list[Example]:
    """Return the texts, and the questions in the chat form of the model's tokenizer."""
    if "default" not in tokenizer.chat_templates:
        return list(TEXTS)
    return [*TEXTS, *(_asked(question, tokenizer) for question in QUESTIONS)]


def _asked(question: Example, tokenizer: Tokenizer) -> Example:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question.text}])
    begin = tokenizer.decode(tokenizer.begin_ids, skip_special_tokens=False)
    text = text.removeprefix(begin)  # the engine sets it
    return question.model_copy(update={"text": text})
