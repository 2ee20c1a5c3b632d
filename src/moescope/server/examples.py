"""Texts to begin with, one click away."""

from moescope.server.schema import Example, Language
from moescope.text.tokenizer import Tokenizer


def _plain(domain: str, language: Language, text: str) -> Example:
    return Example(domain=domain, language=language, label=text, text=text)


TEXTS = (
    _plain("poetry", "zh", "床前明月光，疑是地上"),
    _plain("poetry", "zh", "《春晓》\n唐·孟浩然\n春眠不觉晓，"),
    _plain(
        "prose",
        "en",
        "It is a truth universally acknowledged, that a single man",
    ),
    _plain("code", "en", "def fibonacci(n):\n    a, b ="),
)
QUESTIONS = (
    _plain("translation", "zh", "翻译成中文：moonlight"),
    _plain("translation", "en", "Translate into English: 月光"),
    _plain("arithmetic", "en", "17+25=?"),
    _plain("arithmetic", "zh", "12+7等于多少？"),
    _plain("models", "zh", "什么是混合专家模型？"),
    _plain("models", "en", "What is a mixture of experts?"),
)
"""Asked in the model's own chat form, where it has one."""
QUESTION = "{question}"
HERO = "17+25=?"
"""What the first screen works on."""


def examples(form: str | None) -> list[Example]:
    """Return the texts, and the questions in a model's chat form, if it has one."""
    if form is None:
        return list(TEXTS)
    asked = [q.model_copy(update={"text": form.replace(QUESTION, q.text)}) for q in QUESTIONS]
    return [*TEXTS, *asked]


def hero_text(form: str | None) -> str:
    """Return the text that the first screen works on: a sum, where the model has a chat form."""
    return TEXTS[0].text if form is None else form.replace(QUESTION, HERO)


def question_form(tokenizer: Tokenizer) -> str | None:
    """Return the chat form of a model's tokenizer around `{question}`; None without one."""
    if "default" not in tokenizer.chat_templates:
        return None
    return as_typed(tokenizer, tokenizer.apply_chat_template(ASKED))


ASKED = ({"role": "user", "content": QUESTION},)


def as_typed(tokenizer: Tokenizer, text: str) -> str:
    """Return a chat as a reader types it."""
    begin = tokenizer.decode(tokenizer.begin_ids, skip_special_tokens=False)
    return text.removeprefix(begin)  # the engine sets it
