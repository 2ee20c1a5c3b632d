"""The OpenAI API, so that clients which speak it can ask a model here.

Completions and chats, whole or streamed, over one thread in which all requests share the model.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moescope.api import Model
from moescope.engine.not_finite import NotFinite
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Busy
from moescope.errors import UserError
from moescope.server.metrics import CONTENT_TYPE, CountAnswers, Metrics
from moescope.server.model_thread import ModelThread
from moescope.server.openai_answers import ChatForm, CompletionForm, Form, Json
from moescope.server.openai_schema import DEFAULT_TOKENS, ChatRequest, CompletionRequest
from moescope.server.openai_schema import Request as Asked
from moescope.server.requests import Handler, OwnHostOnly, TooMuch, explained, read_json
from moescope.server.texts import Texts, unless_gone

MOST_BYTES = 16_000_000
"""Bytes of a request."""
PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


def create_api(model: Model, thread: ModelThread, *, name: str, api_key: str | None) -> Starlette:
    """Return the application that answers for `model`.

    Args:
        model: what is asked.
        thread: over the model's engine; closed when the application ends.
        name: what the API calls the model.
        api_key: what every request under /v1 must carry; None if none need.
    """
    metrics = Metrics(thread)
    service = _Service(model, thread, name, metrics)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(thread.close)

    handlers: dict[str, tuple[str, Handler]] = {
        "/v1/models": ("GET", service.models),
        "/v1/models/{name:path}": ("GET", service.models),
        "/v1/completions": ("POST", service.completions),
        "/v1/chat/completions": ("POST", service.chat),
        "/health": ("GET", service.health),
        "/metrics": ("GET", service.metrics),
    }
    app = Starlette(
        routes=[Route(path, handle, methods=[how]) for path, (how, handle) in handlers.items()],
        exception_handlers={
            UserError: _mistake,
            ValidationError: _mistake,
            HTTPException: _refused,
            Exception: _failure,
        },
        lifespan=lifespan,
    )
    if api_key is not None:
        app.add_middleware(KeyNeeded, api_key=api_key)
    else:
        app.add_middleware(
            OwnHostOnly, refuse=_error, way_out="use its address, or serve with --api-key"
        )
    app.add_middleware(CountAnswers, metrics=metrics, paths=frozenset(PATHS))
    return app


class KeyNeeded:
    """Lets only those who know the key ask the model."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            request = Request(scope)
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                await _error(request, 401, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Service:
    """The endpoints of one model."""

    def __init__(self, model: Model, thread: ModelThread, name: str, metrics: Metrics) -> None:
        self._model, self._thread, self._name = model, thread, name
        self._metrics = metrics
        self._since = int(time.time())

    async def health(self, _request: Request) -> Response:
        """Say that the server is alive."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """Say what was counted."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        """List the one model, or describe it."""
        described = {
            "id": self._name,
            "object": "model",
            "created": self._since,
            "owned_by": "moescope",
            "max_model_len": self._model.config.max_position_embeddings,
        }
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [described]})
        self._check_name(request.path_params["name"])
        return JSONResponse(described)

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        arrived = time.perf_counter()
        asked = await read_json(request, CompletionRequest, MOST_BYTES)
        self._check_name(asked.model)
        prompts = await asyncio.to_thread(self._encoded, asked.prompts)
        params = asked.sampling(
            asked.max_tokens or DEFAULT_TOKENS,
            asked.logprobs or 0,
            self._model.engine.defaults.sampling,
        )
        texts = self._begin(arrived, prompts, params)
        form = CompletionForm(self._model, self._name, tells_logprobs=asked.logprobs is not None)
        return await self._answer(request, asked, texts, form)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        arrived = time.perf_counter()
        asked = await read_json(request, ChatRequest, MOST_BYTES)
        self._check_name(asked.model)
        if asked.top_logprobs and not asked.logprobs:
            raise UserError("top_logprobs are only told with logprobs; set logprobs to true")
        messages = [message.plain() for message in asked.messages]
        prompts = [await asyncio.to_thread(self._model.engine.encode_chat, messages)]
        most = asked.max_completion_tokens or asked.max_tokens
        params = asked.sampling(
            most or self._model.config.max_position_embeddings,
            asked.top_logprobs or 0,
            self._model.engine.defaults.sampling,
        )
        texts = self._begin(arrived, prompts, params)
        form = ChatForm(
            self._model,
            self._name,
            prompts[0],
            texts.count,
            tells_logprobs=bool(asked.logprobs),
        )
        return await self._answer(request, asked, texts, form)

    def _check_name(self, name: str | None) -> None:
        if name not in (None, "", self._name):
            raise HTTPException(404, f"there is no model {name!r} here; ask for {self._name!r}")

    def _encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        if not prompts:
            raise UserError("there is no prompt; give a text")
        engine = self._model.engine
        return [engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _begin(
        self, arrived: float, prompts: list[list[int]], params: list[SamplingParams]
    ) -> Texts:
        return Texts(self._thread, self._metrics, arrived, prompts, params)

    async def _answer(self, request: Request, asked: Asked, texts: Texts, form: Form) -> Response:
        if not asked.stream:
            tokens = await unless_gone(request, texts)
            return JSONResponse(form.whole(tokens, texts.count, texts.usage))
        events = _stream(texts, form, tells_usage=asked.tells_usage)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _stream(texts: Texts, form: Form, *, tells_usage: bool) -> AsyncIterator[str]:
    """Hand on tokens as they are made; a mistake in the middle is the last event."""
    usage = {"usage": None} if tells_usage else {}
    try:
        for opening in form.openings(texts.count):
            yield _event(form.chunk([opening]) | usage)
        async for token in texts:
            if (choice := form.piece(token)) is not None:
                yield _event(form.chunk([choice]) | usage)
        if tells_usage:
            yield _event(form.chunk([]) | {"usage": form.usage(texts.usage)})
        yield "data: [DONE]\n\n"
    except UserError as error:
        yield _event(_explanation(_status(error), str(error)))
    except Exception as error:
        yield _event(_explanation(500, _failed(error)))
        raise
    finally:
        texts.end()


def _event(told: Json) -> str:
    # In ASCII: some clients take U+2028 and its kin for the end of a line.
    return f"data: {json.dumps(told)}\n\n"


# --- mistakes -------------------------------------------------------------------------------------


def _explanation(status: int, message: str) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _error(_request: Request, status: int, message: str) -> Response:
    return JSONResponse(_explanation(status, message), status_code=status)


def _status(error: Exception) -> int:
    """The status of a mistake: the server's where its model computes no numbers."""
    statuses = {Busy: 503, TooMuch: 413, NotFinite: 500}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 400)


def _failed(error: Exception) -> str:
    return f"the server failed at this ({type(error).__name__}); its terminal says more"


async def _mistake(request: Request, error: Exception) -> Response:
    if isinstance(error, ValidationError):
        return _error(request, 400, explained(error))
    status = _status(error)
    answer = _error(request, status, str(error))
    if status == 503:
        answer.headers["Retry-After"] = "1"
    return answer


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = f"there is no {request.url.path} here; there are {', '.join(PATHS)}"
    if error.status_code == 405:
        message = f"{request.url.path} is not asked by {request.method}"
    return _error(request, error.status_code, message)


async def _failure(request: Request, error: Exception) -> Response:
    return _error(request, 500, _failed(error))
