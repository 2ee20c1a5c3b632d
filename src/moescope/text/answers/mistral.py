"""Mistral: `[TOOL_CALLS]`, then JSON of all calls (older) or a name and its arguments (newer)."""

from moescope.text.answers.members import Tools, json_call
from moescope.text.answers.pieces import Arguments, Call, Pieces, Source, each, said

CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
THOUGHT = ("[THINK]", "[/THINK]")
MARKS = (CALLS, ARGUMENTS, CALL_ID, *THOUGHT)


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, CALLS)):
        if (yield from source.begins("[")):
            while True:
                yield from json_call(source, "]")
                if (yield from source.take(",", "]"))[1] != ",":
                    break
            continue
        name, mark = yield from source.take(CALL_ID, ARGUMENTS, "{")
        yield Call(name.strip())
        if mark == CALL_ID:
            yield from source.take(ARGUMENTS)
        elif mark == "{":
            source.put_back(mark)
        yield from each(Arguments, source.json_value())
