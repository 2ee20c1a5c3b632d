"""DeepSeek V3.1: a call is its name and its arguments."""

from moescope.text.answers.deepseek_v3 import BEGIN, CALL, CALL_END, END, SEPARATOR
from moescope.text.answers.members import Tools
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, each, said


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, BEGIN)):
        while (yield from source.take(CALL, END))[1] == CALL:
            name, _ = yield from source.take(SEPARATOR)
            yield Call(name.strip())
            yield from each(Arguments, source.json_value())
            yield from source.take(CALL_END)
