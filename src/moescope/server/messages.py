"""Anthropic's `/v1/messages`, whole and streamed, and its `count_tokens`."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.engine.sequence import Token
from moescope.errors import UserError
from moescope.server.chats import Answers, Step
from moescope.server.conversion import Fields, chat_request, function_tool, text_of
from moescope.server.experts import InOtherApis, all_experts_told
from moescope.server.fields import First, Lenient, List
from moescope.server.openai_answers import Json, calls_of
from moescope.server.openai_schema import ChatRequest
from moescope.server.requests import read_json
from moescope.server.service import MAX_BYTES, Endpoint, Service, collected
from moescope.server.streams import error_event, event, streamed, unless_gone
from moescope.server.texts import Arrival
from moescope.text.answers.pieces import Call, Content, Piece, Thought

PING = 'event: ping\ndata: {"type": "ping"}\n\n'
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicMessage(Lenient):
    """What somebody said: text, or blocks of text, thoughts, calls and their results."""

    role: Literal["user", "assistant", "system"]
    content: str | List[dict[str, Any]]


class AnthropicTool(Lenient):
    """A tool that may be called."""

    name: str = Field(min_length=1, max_length=128)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Conversation(Lenient):
    """A conversation, as far as its tokens can be counted."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], First(), Field(min_length=1)]
    system: str | List[dict[str, Any]] | None = None
    tools: List[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def fields(self) -> Fields:
        """The same in OpenAI's words."""
        messages: list[Fields] = []
        if self.system is not None:
            messages.append({"role": "system", "content": text_of(self.system)})
        for message in self.messages:
            messages += _converted(message)
        tools: list[Fields] = []
        for tool in self.tools or []:
            if tool.input_schema is None:
                raise UserError(f"this server has no tool {tool.name!r} of its own; give a schema")
            tools.append(function_tool(tool.name, tool.description, tool.input_schema))
        fields: Fields = {"messages": messages, "tools": tools or None}
        chosen = self.tool_choice or {}
        kinds = {"auto": "auto", "any": "required", "none": "none"}
        if chosen.get("type") == "tool":
            named = {"name": chosen.get("name")}
            fields["tool_choice"] = {"type": "function", "function": named}
        elif chosen:
            fields["tool_choice"] = kinds.get(str(chosen.get("type")), chosen.get("type"))
        if chosen.get("disable_parallel_tool_use"):
            fields["parallel_tool_calls"] = False
        if (self.thinking or {}).get("type") in ("enabled", "disabled"):
            is_on = (self.thinking or {})["type"] == "enabled"
            fields["chat_template_kwargs"] = {"enable_thinking": is_on, "thinking": is_on}
        return fields


class MessagesRequest(Conversation, InOtherApis):
    """Answer a conversation."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: List[str] | None = None
    stream: bool | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    def chat(self) -> ChatRequest:
        """The same in OpenAI's words."""
        output = self.output_format or (self.output_config or {}).get("format")
        form: Fields | None = None
        if isinstance(output, dict):
            schema: Any = output.get("schema")
            if output.get("type") != "json_schema" or schema is None:
                raise UserError("a format is a json_schema with its schema; give one")
            form = {"type": "json_schema", "json_schema": {"schema": schema}}
        return chat_request(
            self.fields()
            | {
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "stop": self.stop_sequences,
                "response_format": form,
                **self.of_experts,
            }
        )


def _converted(message: AnthropicMessage) -> list[Fields]:
    """One message as those that OpenAI's chats have: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Fields] = []
    calls: list[Fields] = []
    texts: list[Any] = []
    thought = ""
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_result":
            content = text_of(block.get("content"))
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            )
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input"))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thought += str(block.get("thinking") or "")
        elif kind != "redacted_thinking":
            texts.append(block)
    told: list[Fields] = [*results]
    if texts or calls or thought or not results:
        said: Fields = {"role": message.role, "content": text_of(texts)}
        if calls:
            said["tool_calls"] = calls
        if thought:
            said["reasoning_content"] = thought
        told.append(said)
    return told


class Messages:
    """The endpoints, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        """All of them."""
        return [
            Endpoint("/v1/messages", self.messages, MessagesRequest),
            Endpoint("/v1/messages/count_tokens", self.count_tokens, Conversation),
        ]

    async def count_tokens(self, request: Request) -> Response:
        """Count a conversation's tokens, as Anthropic's API does."""
        asked = await read_json(request, Conversation, MAX_BYTES)
        chat = await asyncio.to_thread(lambda: chat_request(asked.fields()))
        _, ids = await self._service.chats.encode(chat)
        return JSONResponse({"input_tokens": len(ids)})

    async def messages(self, request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        arrival = Arrival.of(request)
        asked = await read_json(request, MessagesRequest, MAX_BYTES)
        answers = await self._service.chats.begin(await asyncio.to_thread(asked.chat), arrival)
        name = asked.model or self._service.name
        head: Json = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": name,
        }
        if asked.stream:
            events = _events(asked, answers, head)
            return streamed(events, answers.end, _told_wrong, quiet=PING)
        steps = await unless_gone(request, collected(answers))
        told = {"content": _blocks(steps), **_why(steps[-1]), "usage": _usage(answers)}
        told |= all_experts_told(asked, [step.token for step in steps])
        return JSONResponse(head | told)


def _told_wrong(error: Exception) -> str:
    return event(error_event("/v1/messages", error), "error")


def _usage(answers: Answers) -> Json:
    usage = answers.usage
    reused = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - reused,
        "cache_read_input_tokens": reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }


def _why(last: Step | None) -> Json:
    """Why an answer ended, by its last step; None while it is made."""
    if last is None:
        return {"stop_reason": None, "stop_sequence": None}
    reason = REASONS.get(last.finish_reason or "length", "end_turn")
    if reason == "end_turn" and last.token.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": last.token.stop}


def _blocks(steps: Sequence[Step]) -> list[Json]:
    pieces = [piece for step in steps for piece in step.pieces]
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    blocks: list[Json] = []
    if thought:
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    calls = calls_of(steps)
    if content or not calls:
        blocks.append({"type": "text", "text": content})
    for call in calls:
        function = call["function"]
        given = _object(function["arguments"])
        tool_id = call["id"].replace("call_", "toolu_")
        blocks.append({"type": "tool_use", "id": tool_id, "name": function["name"], "input": given})
    return blocks


def _object(text: str) -> Any:
    """Arguments; what a limit has cut off is no JSON, and no arguments."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


async def _events(asked: MessagesRequest, answers: Answers, head: Json) -> AsyncIterator[str]:
    begun = head | {"content": [], **_why(None), "usage": _usage(answers)}
    yield event({"type": "message_start", "message": begun}, "message_start")
    kind: type[Piece] | None = None
    index, last = -1, None
    tokens: list[Token] = []
    async for step in answers:
        if asked.tells_experts:
            tokens.append(step.token)
        last = step
        for piece in step.pieces:
            begins, block, delta = _parts(piece)
            if isinstance(piece, Call) or (kind is not begins):
                if kind is not None:
                    yield _named("content_block_stop", index)
                kind, index = begins, index + 1
                yield _named("content_block_start", index, content_block=block)
            if delta is not None:
                yield _named("content_block_delta", index, delta=delta)
    if kind is not None:
        yield _named("content_block_stop", index)
    ended = {"type": "message_delta", "delta": _why(last), "usage": _usage(answers)}
    ended |= all_experts_told(asked, tokens)
    yield event(ended, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


def _parts(piece: Piece) -> tuple[type[Piece], Json, Json | None]:
    """What a piece belongs to, how that begins, and what the piece adds."""
    if isinstance(piece, Thought):
        delta: Json = {"type": "thinking_delta", "thinking": piece.text}
        return Thought, {"type": "thinking", "thinking": "", "signature": ""}, delta
    if isinstance(piece, Content):
        return Content, {"type": "text", "text": ""}, {"type": "text_delta", "text": piece.text}
    if isinstance(piece, Call):
        tool_id = f"toolu_{uuid.uuid4().hex[:24]}"
        return Call, {"type": "tool_use", "id": tool_id, "name": piece.name, "input": {}}, None
    return Call, {}, {"type": "input_json_delta", "partial_json": piece.text}


def _named(name: str, index: int, **more: Any) -> str:
    return event({"type": name, "index": index, **more}, name)
