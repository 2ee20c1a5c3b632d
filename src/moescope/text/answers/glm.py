"""GLM-4.5 and later: a call is its name, then keys and values between tags."""

from moescope.text.answers.hermes import CALL, CALL_END
from moescope.text.answers.members import Tools, any_value, is_text, member, text_value
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, said

KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
MARKS = (CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END)


def read(source: Source, tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, CALL)):
        name, mark = yield from source.take(KEY, CALL_END)
        name = name.strip()
        yield Call(name)
        first = True
        while mark == KEY:
            key, _ = yield from source.take(KEY_END)
            yield from source.take(VALUE)
            yield member(first, key.strip())
            first = False
            if is_text(tools, name, key.strip()):
                yield from text_value(source.until(VALUE_END))
            else:
                yield any_value((yield from source.take(VALUE_END))[0])
            _, mark = yield from source.take(KEY, CALL_END)
        yield Arguments("{}" if first else "}")
