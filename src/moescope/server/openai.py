"""OpenAI's API: models, completions and chats, whole or streamed; responses are beside it."""

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.errors import UserError
from moescope.server.chats import Answers
from moescope.server.openai_answers import ChatForm, CompletionForm, Json
from moescope.server.openai_schema import DEFAULT_TOKENS, ChatRequest, CompletionRequest
from moescope.server.requests import read_json
from moescope.server.service import MAX_BYTES, Endpoint, Service, collected
from moescope.server.streams import error_event, event, streamed, unless_gone
from moescope.server.texts import Arrival, Texts


class OpenAI:
    """The endpoints, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        """All of them."""
        return [
            Endpoint("/v1/models", self.models, also=("/v1/models/",)),
            Endpoint("/v1/models/{name:path}", self.models),
            Endpoint("/v1/completions", self.completions, CompletionRequest),
            Endpoint("/v1/chat/completions", self.chat, ChatRequest),
        ]

    async def models(self, request: Request) -> Response:
        """The one model."""
        described = {
            "id": self._service.name,
            "object": "model",
            "created": self._service.since,
            "owned_by": "moescope",
            "max_model_len": self._service.model.config.max_position_embeddings,
        }
        if not request.path_params.get("name"):
            return JSONResponse({"object": "list", "data": [described]})
        self._service.check_name(request.path_params["name"])
        return JSONResponse(described)

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        arrival = Arrival.of(request)
        asked = await read_json(request, CompletionRequest, MAX_BYTES)
        self._service.check_name(asked.model)
        prompts = [await self._encoded(prompt) for prompt in asked.prompts]
        if not prompts:
            raise UserError("there is no prompt; give a text")
        constraint = await self._service.chats.constraint(asked)
        more: Json = {} if constraint is None else {"constraint": constraint}
        limit = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        if limit == 0 and not asked.echo and asked.prompt_logprobs is None:
            raise UserError("max_tokens is 0; ask for one token at least, or for echo")
        if limit == -1:
            limit = self._service.model.config.max_position_embeddings
        params = asked.sampling(
            max(1, limit),  # the model is asked even where no more is told than of the prompt
            asked.logprobs or 0,
            self._service.model.engine.defaults.sampling,
            prompt_logprobs=asked.known_of_prompts,
            **more,
        )
        model = self._service.model
        ends = model.engine.end_ids
        form = CompletionForm(model.tokenizer, self._service.name, asked, prompts, ends)
        texts = await self._service.desk.begin(arrival, prompts, params)
        if not asked.stream:
            tokens = await unless_gone(request, collected(texts))
            return await _told(lambda: form.whole(tokens, texts.usage))
        events = _completion_events(texts, form, tells_usage=asked.tells_usage)
        return streamed(events, texts.end, _told_wrong)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        arrival = Arrival.of(request)
        asked = await read_json(request, ChatRequest, MAX_BYTES)
        self._service.check_name(asked.model)
        answers = await self._service.chats.begin(asked, arrival)
        form = ChatForm(self._service.model.tokenizer, self._service.name, asked)
        if not asked.stream:
            steps = await unless_gone(request, collected(answers))
            return await _told(lambda: form.whole(steps, answers.usage))
        events = _chat_events(answers, form, tells_usage=asked.tells_usage)
        return streamed(events, answers.end, _told_wrong)

    async def _encoded(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._service.chats.encode_text(prompt)
        self._service.chats.check(prompt)
        return prompt


async def _told(whole: Callable[[], Json]) -> Response:
    """Write an answer in a thread: what is known of a long prompt takes its time."""
    return await asyncio.to_thread(lambda: JSONResponse(whole()))


async def _completion_events(
    texts: Texts, form: CompletionForm, *, tells_usage: bool
) -> AsyncIterator[str]:
    usage = {"usage": None} if tells_usage else {}
    async for token in texts:
        if (chunk := form.piece(token)) is not None:
            yield event(chunk | usage)
    if tells_usage:
        yield event(form.usage(texts.usage))
    yield "data: [DONE]\n\n"


async def _chat_events(
    answers: Answers, form: ChatForm, *, tells_usage: bool
) -> AsyncIterator[str]:
    usage = {"usage": None} if tells_usage else {}
    for opening in form.openings():
        yield event(opening | usage)
    async for step in answers:
        for chunk in form.chunks(step):
            yield event(chunk | usage)
    if tells_usage:
        yield event(form.usage(answers.usage))
    yield "data: [DONE]\n\n"


def _told_wrong(error: Exception) -> str:
    return event(error_event("/v1", error))
