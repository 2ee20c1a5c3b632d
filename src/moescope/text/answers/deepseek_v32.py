"""DeepSeek V3.2: calls in DSML, each argument a tag that says whether it is a text."""

from moescope.text.answers.members import Tools, any_value, member, text_value
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, said

BEGIN, END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
CALL, CALL_END = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
ARGUMENT, ARGUMENT_END = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"
MARKS = ("｜DSML｜",)


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, BEGIN)):
        while (yield from source.take(CALL, END))[1] == CALL:
            name, _ = yield from source.take('"')
            yield Call(name)
            first = True
            while (yield from source.take(ARGUMENT, CALL_END))[1] == ARGUMENT:
                key, _ = yield from source.take('"')
                attributes, _ = yield from source.take(">")
                yield member(first, key)
                first = False
                if 'string="true"' in attributes:
                    yield from text_value(source.until(ARGUMENT_END))
                else:
                    yield any_value((yield from source.take(ARGUMENT_END))[0])
            yield Arguments("{}" if first else "}")
