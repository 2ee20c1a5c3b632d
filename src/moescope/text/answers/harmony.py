"""gpt-oss ("harmony"): messages in channels; a call is a message to `functions.NAME`."""

import re

from moescope.text.answers.members import Tools
from moescope.text.answers.pieces import (
    Arguments,
    Call,
    Content,
    Pieces,
    Source,
    Thought,
    each,
)

START, MESSAGE, CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
END_OF_CALL = "<|call|>"
ENDS = ("<|end|>", END_OF_CALL, "<|return|>")
MARKS = (START, MESSAGE, CHANNEL, "<|constrain|>", *ENDS)


def read(source: Source, _tools: Tools) -> Pieces[None]:
    """Read an answer behind `<|start|>assistant`, its thoughts among its messages."""
    while True:
        header, mark = yield from source.take(MESSAGE)
        if mark is None:  # no message: what was written instead is said
            if header.strip() and CHANNEL not in header:
                yield Content(header)
            return
        recipient = re.search(r"\bto=(?:functions\.)?([^\s<]+)", header)
        if recipient is not None:
            yield Call(recipient[1])
            kind = Arguments
        else:
            channel = re.match(r"\s*(\w+)", header.rpartition(CHANNEL)[2])
            kind = Thought if channel and channel[1] == "analysis" else Content
        mark = yield from each(kind, source.until(*ENDS, START))
        if mark is None:
            return
        if mark == START:
            source.put_back(mark)
