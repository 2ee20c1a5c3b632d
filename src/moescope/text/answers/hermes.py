"""Hermes and Qwen3: a call is JSON between `<tool_call>` and `</tool_call>`."""

from moescope.text.answers.members import Tools, json_call
from moescope.text.answers.pieces import Pieces, Source, said

CALL, CALL_END = "<tool_call>", "</tool_call>"
MARKS = (CALL, CALL_END)


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind its thought."""
    while (yield from said(source, CALL)):
        yield from json_call(source, CALL_END)
        yield from source.take(CALL_END)
