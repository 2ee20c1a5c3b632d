"""What other APIs' requests say, in the words of a `ChatRequest`."""

from collections.abc import Mapping, Sequence
from typing import Any

from moescope.errors import UserError
from moescope.server.openai_schema import ChatRequest

Fields = dict[str, Any]

TEXTS = ("text", "input_text", "output_text")


def chat_request(fields: Fields) -> ChatRequest:
    """Check what was converted; fields that are None are left out."""
    return ChatRequest.model_validate({k: v for k, v in fields.items() if v is not None})


def text_of(content: Any, kinds: Sequence[str] = TEXTS) -> str:
    """The text of content in parts.

    Args:
        content: a text, or parts.
        kinds: types of parts that have text to be told.

    Raises:
        UserError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise UserError("content is a text or a list of parts; send one of them")
    told = ""
    for part in content:
        if isinstance(part, str):
            told += part
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds:
            raise UserError(
                f"this model reads text alone, no part of type {str(kind)[:40]!r}; send text"
            )
        text = part.get("text")
        told += text if isinstance(text, str) else ""
    return told


def json_schema(schema: Any, name: str = "answer") -> Fields:
    """A `response_format` of a schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def function_tool(name: Any, description: Any, parameters: Any) -> Fields:
    """A tool as OpenAI's chats have it."""
    told = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {k: v for k, v in told.items() if v is not None}}
