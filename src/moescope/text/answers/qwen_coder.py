"""Qwen3-Coder and what follows it: a call is a tag with its name, and so is each argument."""

from moescope.text.answers.hermes import CALL, CALL_END
from moescope.text.answers.members import Tools, any_value, is_text, member, text_value
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, said

FUNCTION, FUNCTION_END = "<function=", "</function>"
ARGUMENT, ARGUMENT_END = "<parameter=", "</parameter>"


def read(source: Source, tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, CALL)):
        while (yield from source.take(FUNCTION, CALL_END))[1] == FUNCTION:
            name, _ = yield from source.take(">")
            yield Call(name)
            first = True
            while (yield from source.take(ARGUMENT, FUNCTION_END))[1] == ARGUMENT:
                key, _ = yield from source.take(">")
                yield member(first, key)
                first = False
                yield from source.begins("\n", after_blanks=False)
                if is_text(tools, name, key):
                    ended = yield from text_value(source.until("\n" + ARGUMENT_END, ARGUMENT_END))
                    if ended is None:
                        return
                else:
                    value, _ = yield from source.take(ARGUMENT_END)
                    yield any_value(value.removesuffix("\n"))
            yield Arguments("{}" if first else "}")
