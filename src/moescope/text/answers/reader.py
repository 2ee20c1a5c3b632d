"""From a model's text to thought, content and calls, in the form that its chat template teaches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moescope.text.answers import (
    deepseek_v3,
    deepseek_v31,
    deepseek_v32,
    glm,
    harmony,
    hermes,
    mistral,
    qwen_coder,
)
from moescope.text.answers.members import Tools
from moescope.text.answers.pieces import Piece, Pieces, Source, Thought, each, said

THINK = ("<think>", "</think>")


def _plain(source: Source, _tools: Tools) -> Pieces[None]:
    yield from said(source)


@dataclass(frozen=True)
class Form:
    """How a family writes answers.

    Attributes:
        name: of the form.
        read: reads an answer, behind its thought where `thought` is not None.
        marks: special tokens that mean something in it.
        thought: what a thought stands between; None where `read` knows.
        calls: whether tools can be called.
    """

    name: str
    read: Callable[[Source, Tools], Pieces[None]]
    marks: tuple[str, ...] = ()
    thought: tuple[str, str] | None = THINK
    calls: bool = True


PLAIN = Form("plain", _plain, calls=False)
DEEPSEEK_V3 = Form("DeepSeek V3", deepseek_v3.read, deepseek_v3.MARKS)
DEEPSEEK_V31 = Form("DeepSeek V3.1", deepseek_v31.read, deepseek_v3.MARKS)
DEEPSEEK_V32 = Form("DeepSeek V3.2", deepseek_v32.read, deepseek_v32.MARKS)
GLM = Form("GLM", glm.read, glm.MARKS)
QWEN_CODER = Form("Qwen3-Coder", qwen_coder.read, hermes.MARKS)
HERMES = Form("Hermes", hermes.read, hermes.MARKS)
MISTRAL = Form("Mistral", mistral.read, mistral.MARKS, mistral.THOUGHT)
HARMONY = Form("harmony", harmony.read, harmony.MARKS, None)

_TOLD_BY: tuple[tuple[tuple[str, ...], Form], ...] = (
    ((harmony.CHANNEL, harmony.START), HARMONY),
    (("｜DSML｜",), DEEPSEEK_V32),
    ((deepseek_v3.BEGIN, deepseek_v3.FENCE), DEEPSEEK_V3),
    ((deepseek_v3.BEGIN,), DEEPSEEK_V31),
    ((glm.KEY,), GLM),
    ((hermes.CALL, qwen_coder.FUNCTION), QWEN_CODER),
    ((hermes.CALL,), HERMES),
    ((mistral.CALLS,), MISTRAL),
)
"""What a template holds that teaches a form; the first whose marks it all holds counts."""


def form_of(template: str) -> Form:
    """The form that a chat template teaches; PLAIN where it teaches no calls."""
    found = (form for marks, form in _TOLD_BY if all(mark in template for mark in marks))
    return next(found, PLAIN)


class AnswerReader:
    """Reads one answer as it is made.

    Args:
        form: of the answer.
        prompt: what it answers, as the template wrote it; it may have begun a thought.
        tools: what may be called; None has calls read as content.

    Attributes:
        is_thinking: whether what comes next belongs to a thought.
    """

    def __init__(self, form: Form, prompt: str, tools: Tools | None) -> None:
        self._source = Source()
        self.is_thinking = False
        if tools is None and form.thought is not None:
            form = Form(PLAIN.name, PLAIN.read, thought=form.thought, calls=False)
        self._form = form
        self._pieces = self._read(prompt, tools or {})

    @property
    def marks(self) -> frozenset[str]:
        """Special tokens that mean something here."""
        return frozenset((*self._form.marks, *(self._form.thought or ())))

    def feed(self, text: str, *, final: bool) -> Iterator[Piece]:
        """Take the next text; yield what became certain."""
        self._source.add(text, final=final)
        for piece in self._pieces:
            if piece is None:
                return
            if self._form.thought is None:
                self.is_thinking = isinstance(piece, Thought)
            yield piece

    def _read(self, prompt: str, tools: Tools) -> Pieces[None]:
        if self._form.thought is not None:
            begin, end = self._form.thought
            if prompt.rstrip().endswith(begin) or (yield from self._source.begins(begin)):
                self.is_thinking = True
                yield from each(Thought, self._source.until(end))
                self.is_thinking = False
        yield from self._form.read(self._source, tools)
