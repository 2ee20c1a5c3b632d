"""Ollama's API, which many desktop clients speak alone: JSON lines instead of events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.errors import UserError
from moescope.server.chats import Answers, Step
from moescope.server.conversion import Fields, chat_request, json_schema
from moescope.server.experts import InOtherApis, all_experts_told
from moescope.server.fields import Lenient, List
from moescope.server.openai_answers import Json, calls_of
from moescope.server.openai_schema import ChatRequest
from moescope.server.requests import read_json
from moescope.server.service import MAX_BYTES, Endpoint, Service, collected
from moescope.server.streams import error_event, streamed, unless_gone
from moescope.server.texts import Arrival
from moescope.text.answers.pieces import Content, Thought

OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}
"""Ollama's names of what OpenAI's and vLLM's requests have."""
WITHOUT_EFFECT = ("mirostat", "typical_p", "tfs_z")
"""Options that are refused where they ask for something, as in OpenAI's requests."""


class OllamaMessage(Lenient):
    """What somebody said."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: List[dict[str, Any]] | None = None
    tool_name: str | None = None

    def fields(self) -> Fields:
        """The same in OpenAI's words."""
        if self.images:
            raise UserError("this model reads text alone, no images; leave them out")
        told: Fields = {"role": self.role, "content": self.content}
        if self.thinking:
            told["reasoning_content"] = self.thinking
        if self.tool_calls:
            told["tool_calls"] = [{"function": call.get("function")} for call in self.tool_calls]
        if self.tool_name:
            told["name"] = self.tool_name
        return told


class Asked(InOtherApis):
    """What chats and continuations share."""

    model: str
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None

    def fields(self) -> Fields:
        """The same in OpenAI's words.

        Raises:
            UserError: the form is none.
        """
        options = self.options or {}
        told: Fields = {ours: options.get(theirs) for theirs, ours in OPTIONS.items()}
        # Ollama's own clients send nothing beside options.
        told |= InOtherApis.model_validate(options).of_experts | self.of_experts
        told |= {name: options.get(name) for name in WITHOUT_EFFECT}
        most = options.get("num_predict")
        told["max_tokens"] = most if isinstance(most, int) and most > 0 else None
        if self.format == "json":
            told["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            told["response_format"] = json_schema(self.format)
        elif self.format:
            raise UserError(f"format is {self.format[:40]!r}; give json or a schema")
        if isinstance(self.think, bool):
            told["chat_template_kwargs"] = {"enable_thinking": self.think, "thinking": self.think}
        elif self.think:
            told["reasoning_effort"] = self.think
        return told


class OllamaChat(Asked):
    """Answer a conversation."""

    messages: List[OllamaMessage] = Field(default=[])
    tools: List[dict[str, Any]] | None = None

    def chat(self) -> ChatRequest:
        """The same in OpenAI's words."""
        messages = [message.fields() for message in self.messages]
        return chat_request(self.fields() | {"messages": messages, "tools": self.tools or None})


class OllamaGenerate(Asked):
    """Answer one prompt."""

    prompt: str = ""
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    raw: bool = False
    images: list[Any] | None = None

    def chat(self) -> ChatRequest:
        """The same in OpenAI's words."""
        for name in ("suffix", "template", "images"):
            if getattr(self, name):
                raise UserError(f"this server does not know {name}; leave it out")
        messages = [{"role": "user", "content": self.prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return chat_request(self.fields() | {"messages": messages})


class OllamaShow(Lenient):
    """Ask what a model is."""

    model: str | None = None
    name: str | None = None


class Ollama:
    """The endpoints, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._since = _now()

    def endpoints(self) -> list[Endpoint]:
        """All of them."""
        return [
            Endpoint("/api/chat", self.chat, OllamaChat),
            Endpoint("/api/generate", self.generate, OllamaGenerate),
            Endpoint("/api/show", self.show, OllamaShow),
            Endpoint("/api/tags", self.tags),
            Endpoint("/api/version", self.version),
        ]

    async def version(self, _request: Request) -> Response:
        """The version, where Ollama's clients ask for it."""
        return JSONResponse({"version": version("moescope")})

    async def tags(self, _request: Request) -> Response:
        """The one model, as Ollama lists it."""
        name, config = self._service.name, self._service.model.config
        details = {"format": "safetensors", "family": config.model_type, "families": None}
        told = {"name": name, "model": name, "modified_at": self._since, "size": 0, "digest": ""}
        return JSONResponse({"models": [told | {"details": details}]})

    async def show(self, request: Request) -> Response:
        """What the model is, as Ollama tells it."""
        asked = await read_json(request, OllamaShow, MAX_BYTES)
        self._check(asked.model or asked.name or "")
        model = self._service.model
        kind = model.config.model_type
        capabilities = ["completion"]
        template = model.tokenizer.chat_templates.get("default", "")
        if self._service.chats.knows_tools:
            capabilities.append("tools")
        if "think" in template:
            capabilities.append("thinking")
        info = {"general.architecture": kind}
        length = {f"{kind}.context_length": model.config.max_position_embeddings}
        told: Json = {"modelfile": "", "template": template, "capabilities": capabilities}
        told["details"] = {"format": "safetensors", "family": kind, "families": [kind]}
        return JSONResponse(told | {"model_info": info | length, "modified_at": self._since})

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, as Ollama does."""
        asked = await read_json(request, OllamaChat, MAX_BYTES)
        self._check(asked.model)
        if not asked.messages:  # Ollama's clients have a model loaded so
            return JSONResponse(self._loaded() | {"message": _message([])})
        return await self._answered(request, asked, is_chat=True)

    async def generate(self, request: Request) -> Response:
        """Answer one prompt, as Ollama does."""
        asked = await read_json(request, OllamaGenerate, MAX_BYTES)
        self._check(asked.model)
        if not asked.prompt:
            return JSONResponse(self._loaded() | {"response": ""})
        return await self._answered(request, asked, is_chat=False)

    async def _answered(
        self, request: Request, asked: "OllamaChat | OllamaGenerate", *, is_chat: bool
    ) -> Response:
        arrival = Arrival.of(request)
        begun = arrival.at
        chat = await asyncio.to_thread(asked.chat)
        as_it_stands = None
        if isinstance(asked, OllamaGenerate) and (asked.raw or not self._has_template):
            if asked.system:
                raise UserError("the prompt is read as it stands, in no template; leave system out")
            as_it_stands = asked.prompt
        answers = await self._service.chats.begin(chat, arrival, as_it_stands)
        if asked.stream:
            lines = self._lines(chat, answers, begun, is_chat=is_chat)
            return streamed(
                lines, answers.end, _told_wrong, quiet="", media_type="application/x-ndjson"
            )
        steps = await unless_gone(request, collected(answers))
        told = self._line(steps, is_chat=is_chat) | _ended(steps, answers, begun)
        return JSONResponse(told | all_experts_told(chat, [step.token for step in steps]))

    async def _lines(
        self, chat: ChatRequest, answers: Answers, begun: float, *, is_chat: bool
    ) -> AsyncIterator[str]:
        calls: list[Step] = []
        last: Step | None = None
        async for step in answers:
            last = step
            calls.append(step)
            told = self._line([step], is_chat=is_chat, calls=False)
            parts = told["message"] if is_chat else told
            experts = all_experts_told(chat, [step.token])
            said = parts.get("content") or parts.get("response") or parts.get("thinking")
            if said or experts:
                yield json.dumps(told | experts) + "\n"
        told = self._line([], is_chat=is_chat)
        if is_chat and (made := _calls(calls)):
            yield json.dumps(told | {"message": told["message"] | {"tool_calls": made}}) + "\n"
        yield json.dumps(told | _ended([last] if last else [], answers, begun)) + "\n"

    def _line(self, steps: Sequence[Step], *, is_chat: bool, calls: bool = True) -> Json:
        head: Json = {"model": self._service.name, "created_at": _now(), "done": False}
        message = _message(steps)
        if is_chat:
            made = _calls(steps) if calls else []
            return head | {"message": message | ({"tool_calls": made} if made else {})}
        thought = {"thinking": message["thinking"]} if "thinking" in message else {}
        return head | {"response": message["content"]} | thought

    def _loaded(self) -> Json:
        head: Json = {"model": self._service.name, "created_at": _now()}
        return head | {"done": True, "done_reason": "load"}

    @property
    def _has_template(self) -> bool:
        return bool(self._service.model.tokenizer.chat_templates)

    def _check(self, name: str) -> None:
        if name.removesuffix(":latest") != self._service.name:
            raise HTTPException(404, f"model {name[:200]!r} not found; ask /api/tags")


def _message(steps: Sequence[Step]) -> Json:
    pieces = [piece for step in steps for piece in step.pieces]
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return {"role": "assistant", "content": content} | ({"thinking": thought} if thought else {})


def _calls(steps: Sequence[Step]) -> list[Json]:
    """Calls with their arguments as objects; what a limit has cut off is no call."""
    made: list[Json] = []
    for call in calls_of(steps):
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except ValueError:
            continue
        made.append({"function": {"name": call["function"]["name"], "arguments": arguments}})
    return made


def _ended(steps: Sequence[Step], answers: Answers, begun: float) -> Json:
    reason = steps[-1].finish_reason if steps else "stop"
    usage = answers.usage
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": int((time.perf_counter() - begun) * 1e9),
        "prompt_eval_count": usage["prompt_tokens"],
        "eval_count": usage["completion_tokens"],
    }


def _told_wrong(error: Exception) -> str:
    return json.dumps(error_event("/api/", error)) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat()
