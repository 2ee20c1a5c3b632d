"""Calls that must be made, as a grammar: each form's marks around JSON that a tool's schema allows.

The grammar is Lark as llguidance reads it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from moescope.errors import UserError
from moescope.text.answers import (
    deepseek_v3,
    deepseek_v32 as dsml,
    glm,
    harmony,
    hermes,
    mistral,
    qwen_coder,
)
from moescope.text.answers.members import Tools, is_text
from moescope.text.answers.reader import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    GLM,
    HARMONY,
    HERMES,
    MISTRAL,
    QWEN_CODER,
    Form,
)

Mark = Callable[[str], str]
BLANKS = r"[ \t\n]{0,32}"
"""Between the parts of JSON; endless blanks would be no answer."""


def calls_grammar(
    form: Form, template: str, tools: Tools, special_id: Callable[[str], int | None], *, one: bool
) -> str:
    """Return the grammar of calls of `tools`, at least one.

    Args:
        form: in which calls are written.
        template: that teaches it.
        tools: that may be called.
        special_id: the id of a special token by its spelling; None for what is spelled in text.
        one: whether there is one call alone.

    Raises:
        UserError: the form knows no calls.
    """

    def mark(text: str) -> str:
        token_id = special_id(text)
        return _text(text) if token_id is None else f"<[{token_id}]>"

    before, between, after = _around(form, template, mark)
    before, after = before or '""', after or '""'
    calls = [_call(form, template, name, schema, mark) for name, schema in tools.items()]
    more = "" if one else f" ({between} call)*"
    alternatives = "\n    | ".join(calls)
    return f"start: {before} call{more} {after}\ncall: {alternatives}\n"


def _around(form: Form, template: str, mark: Mark) -> tuple[str, str, str]:
    """What stands before, between and after calls."""
    if form in (DEEPSEEK_V3, DEEPSEEK_V31):
        newline = _text("\n") if form is DEEPSEEK_V3 else ""
        return mark(deepseek_v3.BEGIN), newline, mark(deepseek_v3.END)
    if form is DEEPSEEK_V32:
        return _dsml(dsml.BEGIN + "\n", mark), "", _dsml(dsml.END, mark)
    if form is MISTRAL and mistral.ARGUMENTS not in template:
        return _row(mark(mistral.CALLS), _text("[")), _text(", "), _text("]")
    if form is HARMONY:
        return "", _row(mark("<|end|>"), mark(harmony.START), _text("assistant")), ""
    if form.calls:
        return "", "" if form is MISTRAL else _text("\n"), ""
    raise UserError("this model's chat template teaches no calls of tools; leave tool_choice out")


def _call(form: Form, template: str, name: str, schema: Mapping[str, Any], mark: Mark) -> str:
    arguments = _json({"type": "object", **schema})
    if form in (DEEPSEEK_V3, DEEPSEEK_V31):
        begin, end = mark(deepseek_v3.CALL), mark(deepseek_v3.CALL_END)
        separator = mark(deepseek_v3.SEPARATOR)
        if form is DEEPSEEK_V31:
            return _row(begin, _text(name), separator, arguments, end)
        fence = _text(f"{name}\n{deepseek_v3.FENCE}\n")
        return _row(begin, _text("function"), separator, fence, arguments, _text("\n```"), end)
    if form is HARMONY:
        to = _text(f"commentary to=functions.{name} ")
        kind = _row(mark("<|constrain|>"), _text("json"))
        return _row(mark(harmony.CHANNEL), to, kind, mark(harmony.MESSAGE), arguments)
    if form is MISTRAL and mistral.ARGUMENTS in template:
        return _row(mark(mistral.CALLS), _text(name), mark(mistral.ARGUMENTS), arguments)
    begin = _text('{"name": ' + json.dumps(name) + ', "arguments": ')
    if form is MISTRAL:
        return _row(begin, arguments, _text("}"))
    if form is HERMES:
        newline, end = _text("\n"), mark(hermes.CALL_END)
        return _row(mark(hermes.CALL), newline, begin, arguments, _text("}"), newline, end)
    return _tagged(form, name, schema, mark)


def _tagged(form: Form, name: str, schema: Mapping[str, Any], mark: Mark) -> str:
    """A call whose arguments stand between tags: those required, and others in their order."""
    properties: Mapping[str, Any] = schema.get("properties") or {}
    parts: list[str] = []
    for key, kind in properties.items():
        text = is_text({name: schema}, name, key)
        value = "/[^<]*/" if text else _json(kind if isinstance(kind, Mapping) else {})
        if form is GLM:
            begin = _row(mark(glm.KEY), _text(key), mark(glm.KEY_END), _text("\n"))
            part = _row(begin, mark(glm.VALUE), value, mark(glm.VALUE_END), _text("\n"))
        elif form is QWEN_CODER:
            begin = _text(f"{qwen_coder.ARGUMENT}{key}>\n")
            end = _text(f"\n{qwen_coder.ARGUMENT_END}\n")
            # One lexeme: the line break before the end would be taken for the value's.
            part = _row(begin, r"/[^<]*\n<\/parameter>\n/" if text else _row(value, end))
        else:
            told = "true" if text else "false"
            begin = _dsml(f'{dsml.ARGUMENT}{key}" string="{told}">', mark)
            part = _row(begin, value, _dsml(dsml.ARGUMENT_END + "\n", mark))
        parts.append(part if key in schema.get("required", ()) else f"({part})?")
    inside = _row(*parts)
    if form is GLM:
        return _row(mark(hermes.CALL), _text(name + "\n"), inside, mark(hermes.CALL_END))
    if form is QWEN_CODER:
        begin = _row(mark(hermes.CALL), _text(f"\n{qwen_coder.FUNCTION}{name}>\n"))
        end = _row(_text(f"{qwen_coder.FUNCTION_END}\n"), mark(hermes.CALL_END))
        return _row(begin, inside, end)
    begin = _dsml(f'{dsml.CALL}{name}">\n', mark)
    return _row(begin, inside, _dsml(dsml.CALL_END + "\n", mark))


def _row(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _dsml(text: str, mark: Mark) -> str:
    """A tag of DSML, whose mark may be a token of its own."""
    before, sign, after = text.partition(dsml.MARKS[0])
    return _row(_text(before), mark(sign), _text(after))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _json(schema: Mapping[str, Any]) -> str:
    held = {**schema, "x-guidance": {"whitespace_pattern": BLANKS}}
    return f"%json {json.dumps(held, ensure_ascii=False)}"
