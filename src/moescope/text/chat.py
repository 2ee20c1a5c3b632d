"""Chat templates: messages into the text that a model was taught to answer.

A template is Jinja and runs in Jinja's sandbox, with what `transformers` gives it: trimmed blocks,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, `break` and `continue`, and
`{% generation %}`. A model has one template, or several by name: `tool_use` is taken where there
are tools, else `default`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moescope.errors import UserError
from moescope.files import read_object

Messages = Sequence[Mapping[str, Any]]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's thought is called, by those who write templates and by those who use them."""


def named_templates(value: Any) -> dict[str, str]:
    """Return templates by name, from what `chat_template` may be in a configuration.

    Args:
        value: a template, a list of `{"name": …, "template": …}`, a mapping, or None.

    Raises:
        UserError: it is nothing of these.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        pairs = value.items() if isinstance(value, dict) else [_pair(entry) for entry in value]
        templates: dict[Any, Any] = dict(pairs)
        if all(isinstance(part, str) for pair in templates.items() for part in pair):
            return templates
    except (TypeError, KeyError):
        pass
    raise UserError(
        "chat_template is neither a text nor a list of names and templates; repair "
        "tokenizer_config.json or fetch it again"
    )


def folder_templates(folder: Path) -> dict[str, str]:
    """Return the templates that lie in files of their own beside a tokenizer, by name.

    They are `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else the old
    `chat_template.json`.

    Raises:
        UserError: a file is not text, or `chat_template.json` is not what its name says.
    """
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in sorted(files.items())}
    old = folder / "chat_template.json"
    return named_templates(read_object(old).get("chat_template")) if old.exists() else {}


def render(
    templates: Mapping[str, str],
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Return `messages` ({"role": …, "content": …}) as a template writes them.

    Args:
        templates: by name.
        messages: fields that are None are left out; a thought goes by all of its names.
        tools: what the model may call, as JSON schemas.
        variables: what else the template may use, by any other names.

    Raises:
        UserError: there is no template, or it refuses the messages.
    """
    chosen = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if chosen not in templates:
        named = f"; it has {', '.join(sorted(templates))}" if templates else ""
        raise UserError(f"this tokenizer has no chat template{named}; give a plain prompt instead")
    told = [_told(message) for message in messages]
    try:
        return _compiled(templates[chosen]).render(
            {"documents": None, **variables, "messages": told, "tools": tools}
        )
    except _MISTAKES as error:
        raise UserError(
            f"the chat template refuses these messages ({error}); check their roles and content"
        ) from error


_MISTAKES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template may raise that meets messages it was not written for."""


def _pair(entry: Any) -> tuple[Any, Any]:
    return entry["name"], entry["template"]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; fetch it again") from error


def _told(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it."""
    told = {name: value for name, value in message.items() if value is not None}
    calls: Any = told.get("tool_calls")
    if isinstance(calls, list):
        told["tool_calls"] = [_told_call(call) for call in cast("list[Any]", calls)]
    reasoning = next((told[name] for name in REASONING if name in told), None)
    return (
        told
        if reasoning is None
        else {"thinking": reasoning, **told, "reasoning_content": reasoning}
    )


class WrittenArguments(dict[str, Any]):
    """Arguments of a call that came as JSON: an object to some templates, its text to others."""

    def __init__(self, text: str, value: dict[str, Any]) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def _told_call(call: Any) -> Any:
    """A call as templates read it; arguments that came as JSON can be read as what they mean."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    text: str = function["arguments"]
    try:
        value = json.loads(text)
    except ValueError:
        return call
    if not isinstance(value, dict):
        return call
    arguments = WrittenArguments(text, cast("dict[str, Any]", value))
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks what a model says itself."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Keep what is inside, with names of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    names = cast("dict[str, Any]", environment.globals)
    names.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template)
