"""OpenAI's `/v1/responses`, whole and streamed; nothing is stored, a request brings its history."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.engine.sequence import Token
from moescope.errors import UserError
from moescope.server.chats import Answers
from moescope.server.conversion import Fields, chat_request, function_tool, json_schema, text_of
from moescope.server.experts import InOtherApis, all_experts_told
from moescope.server.fields import List
from moescope.server.openai_answers import Json
from moescope.server.openai_schema import ChatRequest
from moescope.server.requests import read_json
from moescope.server.service import MAX_BYTES, Endpoint, Service, collected
from moescope.server.streams import error_event, event, streamed, unless_gone
from moescope.server.texts import Arrival
from moescope.text.answers.pieces import Arguments, Call, Content, Piece, Thought


class ResponsesRequest(InOtherApis):
    """Answer a text or a history; tools that a server would have to run itself are passed over."""

    model: str | None = None
    input: str | List[dict[str, Any]]
    instructions: str | None = None
    tools: List[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None

    def chat(self) -> ChatRequest:
        """The same as a chat.

        Raises:
            UserError: it asks for what is stored, or for a form that is none.
        """
        for name in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, name):
                raise UserError(f"this server stores nothing; leave {name} out, send all of input")
        tools = [
            function_tool(tool.get("name"), tool.get("description"), tool.get("parameters"))
            for tool in self.tools or []
            if tool.get("type") == "function"
        ]
        chosen: Any = self.tool_choice
        if isinstance(chosen, dict):
            chosen = {"type": chosen.get("type"), "function": {"name": chosen.get("name")}}
        elif chosen == "auto" and not tools:
            chosen = None
        return chat_request(
            {
                "messages": self._messages(),
                "tools": tools or None,
                "tool_choice": chosen,
                "parallel_tool_calls": self.parallel_tool_calls,
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "response_format": self._format(),
                "reasoning_effort": (self.reasoning or {}).get("effort"),
                **self.of_experts,
            }
        )

    def _format(self) -> Fields | None:
        form: Any = (self.text or {}).get("format")
        if not isinstance(form, dict) or form.get("type") in (None, "text"):
            return None
        if form["type"] == "json_schema":
            return json_schema(form.get("schema"))
        return {"type": form["type"]}

    def _messages(self) -> list[Fields]:
        messages: list[Fields] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        thought = ""
        for item in self.input:
            kind = item.get("type", "message")
            if kind == "message":
                said = {"role": item.get("role"), "content": text_of(item.get("content"))}
            elif kind == "reasoning":
                thought += text_of(item.get("content"), ("reasoning_text", "text"))
                continue
            elif kind == "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                    continue
                said = {"role": "assistant", "content": "", "tool_calls": [call]}
            elif kind == "function_call_output":
                content = text_of(item.get("output"))
                said = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            else:
                raise UserError(f"this server does not know input of type {str(kind)[:40]!r}")
            if thought and said["role"] == "assistant":
                said["reasoning_content"], thought = thought, ""
            messages.append(said)
        return messages


class Responses:
    """The endpoint, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        """All of them."""
        return [Endpoint("/v1/responses", self.responses, ResponsesRequest)]

    async def responses(self, request: Request) -> Response:
        """Answer a text or a history."""
        arrival = Arrival.of(request)
        asked = await read_json(request, ResponsesRequest, MAX_BYTES)
        self._service.check_name(asked.model)
        answers = await self._service.chats.begin(await asyncio.to_thread(asked.chat), arrival)
        output = _Output(asked, self._service.name, answers)
        if asked.stream:
            return streamed(output.events(), answers.end, output.told_wrong)
        await unless_gone(request, collected(output.events()))
        return JSONResponse(output.response)


class _Output:
    """A response in the making, and the events that tell of it."""

    def __init__(self, asked: ResponsesRequest, name: str, answers: Answers) -> None:
        self._answers, self._asked = answers, asked
        self._number = -1
        self._item: Json | None = None
        self.response: Json = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": name,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": asked.reasoning or {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": asked.metadata or {},
        }

    async def events(self) -> AsyncIterator[str]:
        """Yield what happens, until the response is complete."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)
        reason = "length"
        tokens: list[Token] = []
        async for step in self._answers:
            if self._asked.tells_experts:
                tokens.append(step.token)
            reason = step.finish_reason or reason
            for piece in step.pieces:
                for told in self._piece(piece):
                    yield told
        for told in self._item_done("incomplete" if reason == "length" else "completed"):
            yield told
        self.response["usage"] = self._usage()
        self.response |= all_experts_told(self._asked, tokens)
        if reason == "length":
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            yield self._event("response.incomplete", response=self.response)
        else:
            self.response["status"] = "completed"
            yield self._event("response.completed", response=self.response)

    def told_wrong(self, error: Exception) -> str:
        """The last event of what went wrong."""
        told = error_event("/v1/responses", error)["error"]
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": told["message"]}
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **more: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **more}, kind)

    def _piece(self, piece: Piece) -> Iterator[str]:
        kinds = {Thought: "reasoning", Content: "message"}
        kind = next((name for of, name in kinds.items() if isinstance(piece, of)), "function_call")
        if isinstance(piece, Call) or self._item is None or self._item["type"] != kind:
            yield from self._item_done("completed")
            yield from self._begun(kind, piece)
        if isinstance(piece, Call):
            return
        assert self._item is not None
        if isinstance(piece, Arguments):
            self._item["arguments"] += piece.text
            yield self._of_item("response.function_call_arguments.delta", delta=piece.text)
            return
        self._item["content"][0]["text"] += piece.text
        part: Json = {"content_index": 0, "delta": piece.text}
        if isinstance(piece, Content):
            yield self._of_item("response.output_text.delta", **part, logprobs=[])
        else:
            yield self._of_item("response.reasoning_text.delta", **part)

    def _begun(self, kind: str, piece: Piece) -> Iterator[str]:
        number = uuid.uuid4().hex[:24]
        if isinstance(piece, Call):
            item: Json = {"id": f"fc_{number}", "call_id": f"call_{number}", "name": piece.name}
            item["arguments"] = ""
        elif kind == "message":
            item = {"id": f"msg_{number}", "role": "assistant", "content": []}
        else:
            item = {"id": f"rs_{number}", "summary": [], "content": []}
        self._item = {"type": kind, "status": "in_progress"} | item
        self.response["output"].append(self._item)
        yield self._of_item("response.output_item.added", item=self._item)
        if kind == "message":
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            part = {"type": "reasoning_text", "text": ""}
        if kind != "function_call":
            told = self._of_item("response.content_part.added", content_index=0, part=part)
            self._item["content"].append(part)
            yield told

    def _item_done(self, status: str) -> Iterator[str]:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            told: Json = {"arguments": item["arguments"], "name": item["name"]}
            yield self._of_item("response.function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            is_text = item["type"] == "message"
            kind = "output_text" if is_text else "reasoning_text"
            known: Json = {"logprobs": []} if is_text else {}
            told = {"content_index": 0, "text": part["text"]} | known
            yield self._of_item(f"response.{kind}.done", **told)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._of_item("response.output_item.done", item=item)
        self._item = None

    def _of_item(self, kind: str, **more: Any) -> str:
        assert self._item is not None
        at = len(self.response["output"]) - 1
        where: Json = {"output_index": at}
        if "item" not in more:
            where["item_id"] = self._item["id"]
        return self._event(kind, **where, **more)

    def _usage(self) -> Json:
        usage = self._answers.usage
        thought = usage["completion_tokens_details"]["reasoning_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": usage["total_tokens"],
        }
