"""Arguments of calls: JSON as models write it, and JSON made of what is written as tags."""

import json
from collections.abc import Mapping
from typing import Any

from moescope.text.answers.pieces import (
    Arguments,
    Call,
    Content,
    Pieces,
    Source,
    Texts,
    each,
    gathered,
)

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""


def json_call(source: Source, end: str) -> Pieces[None]:
    """Read `{"name": …, "arguments": {…}}`, in any order; what is no such thing is content.

    Args:
        source: behind the mark that begins a call.
        end: the mark that ends it, which is left where it is.
    """
    before, mark = yield from source.take("{", end)
    if mark != "{":
        if mark is not None:
            source.put_back(mark)
        if before.strip():
            yield Content(before)
        return
    name: str | None = None
    waiting: str | None = None
    is_told = False
    while True:
        _, mark = yield from source.take('"', "}")
        if mark != '"':
            break
        key, _ = yield from source.take('"')
        yield from source.take(":")
        if key == "name":
            name = _unquoted((yield from gathered(source.json_value())))
            yield Call(name)
        elif key not in ("arguments", "parameters"):
            yield from gathered(source.json_value())
        elif name is None:
            waiting = yield from gathered(source.json_value())
        elif (yield from source.begins('"')):  # JSON in a string
            source.put_back('"')
            yield Arguments(_unquoted((yield from gathered(source.json_value()))))
            is_told = True
        else:
            is_told = True
            yield from each(Arguments, source.json_value())
    if name is not None and not is_told:
        yield Arguments(_unquoted(waiting) if waiting else "{}")


def member(first: bool, key: str) -> Arguments:
    """Begin an argument."""
    return Arguments(("{" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": ")


def text_value(texts: Texts[str | None]) -> Pieces[str | None]:
    """Tell a text, piece by piece, as a JSON string."""
    yield Arguments('"')
    mark = yield from each(
        lambda text: Arguments(json.dumps(text, ensure_ascii=False)[1:-1]), texts
    )
    yield Arguments('"')
    return mark


def any_value(text: str) -> Arguments:
    """Tell JSON as it is, anything else as a JSON string."""
    try:
        json.loads(text)
    except ValueError:
        return Arguments(json.dumps(text, ensure_ascii=False))
    return Arguments(text.strip())


def is_text(tools: Tools, name: str, key: str) -> bool:
    """Whether an argument is a text by its tool's schema."""
    properties = tools.get(name, {}).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip('"')
    return value if isinstance(value, str) else text
