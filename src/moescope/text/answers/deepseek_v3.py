"""DeepSeek V3 and R1: a call is `function`, its name, and its arguments in a fence."""

from moescope.text.answers.members import Tools
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, each, said

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
MARKS = (BEGIN, END, CALL, CALL_END, SEPARATOR)
FENCE = "```json"


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, BEGIN)):
        while (yield from source.take(CALL, END))[1] == CALL:
            yield from source.take(SEPARATOR)
            name, _ = yield from source.take("\n")
            yield Call(name.strip())
            yield from source.take(FENCE)
            yield from each(Arguments, source.json_value())
            yield from source.take(CALL_END)
