"""The application of `moescope serve`: APIs over one model, and the page beside them.

The APIs are those of OpenAI, Anthropic and Ollama. The page's own lies below `PAGE`, where its
names are none of theirs.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from moescope.api import Model
from moescope.errors import UserError
from moescope.scope.parts import Parts
from moescope.server.access import (
    DOCS_FILES,
    PAGE,
    HostAllowed,
    KeyNeeded,
    OpenOnly,
    OthersOrigins,
)
from moescope.server.app import page_part, page_refusal
from moescope.server.errors import code_of, failed, refuse, status_of
from moescope.server.messages import Messages
from moescope.server.metrics import CONTENT_TYPE, CountAnswers, Metrics
from moescope.server.model_thread import ModelThread
from moescope.server.ollama import Ollama
from moescope.server.openai import OpenAI
from moescope.server.openai_answers import Json
from moescope.server.requests import PATIENCE, explained
from moescope.server.responses import Responses
from moescope.server.service import Endpoint, Service
from moescope.server.studio import Studio
from moescope.server.texts import Desk
from moescope.server.tokens import Tokens
from moescope.server.traffic import MAX_PICTURE, Traffic

PART_TOKENS = 64
PART_ROWS = 64
"""What the page computes at a time: as much as a step of many texts, so that nobody waits long."""


@dataclass(frozen=True)
class Access:
    """Who may ask a server.

    Attributes:
        api_key: that every request must carry; None if none need.
        metrics_key: that opens /metrics too.
        hosts: names that the server answers to, besides its machine's and its addresses.
        origins: of pages that may ask, as https://example.org; "*" for all.
        patience: seconds in which a request's head and body must come.
    """

    api_key: str | None = None
    metrics_key: str | None = None
    hosts: Iterable[str] = ()
    origins: Iterable[str] = ()
    patience: float = PATIENCE


def create_api(
    model: Model,
    thread: ModelThread,
    *,
    name: str,
    access: Access | None = None,
    watch: bool = False,
) -> FastAPI:
    """Return the application that answers for `model`.

    Its `state.ending`, once set, has new requests refused.

    Args:
        model: what is asked.
        thread: over the model's engine; closed when the application ends.
        name: what the API calls the model.
        access: who may ask; those who name this machine, if nothing is said.
        watch: whether the page shows what is asked to all who may ask.
    """
    access = access or Access()
    metrics = Metrics(thread)
    traffic = Traffic(model.tokenizer) if watch else None
    service = Service(model, Desk(thread, metrics, traffic), name)
    apis = (OpenAI, Responses, Messages, Tokens, Ollama)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(thread.close)
        await service.chats.close()

    app = FastAPIOffline(
        static_url=DOCS_FILES,
        title="moescope",
        version=version("moescope"),
        description=f"{name}, asked by the APIs of OpenAI, Anthropic and Ollama.",
        redoc_url=None,
        exception_handlers={
            UserError: _mistake,
            ValidationError: _mistake,
            HTTPException: _refused,
            Exception: _failure,
        },
        lifespan=lifespan,
    )
    app.state.ending = False
    app.state.patience = access.patience
    endpoints = [endpoint for api in apis for endpoint in api(service).endpoints()]
    endpoints += [Endpoint("/health", _health), Endpoint("/metrics", _metrics)]
    app.state.metrics = metrics
    for endpoint in endpoints:
        _add(app, endpoint)
    _describe(app, endpoints)
    app.state.paths = [endpoint.path for endpoint in endpoints]
    app.add_route("/", _page, include_in_schema=False)
    app.mount(PAGE, _page_beside(service, traffic, app.state))
    app.add_middleware(OpenOnly, refuse=_refuse, is_ending=lambda: app.state.ending)
    if access.api_key is None:
        app.add_middleware(HostAllowed, refuse=_refuse, names=access.hosts)
    app.add_middleware(
        KeyNeeded, refuse=_refuse, api_key=access.api_key, metrics_key=access.metrics_key
    )
    if origins := list(access.origins):
        app.add_middleware(
            OthersOrigins,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(CountAnswers, metrics=metrics, paths=frozenset(app.state.paths))
    return app


def _page_beside(service: Service, traffic: Traffic | None, state: State) -> Starlette:
    """The page over the model that is asked, which takes its turns like one more request.

    It opens no further model, and its chat form is written where all are.
    """
    thread, model = service.desk.thread, service.model
    parts = Parts(PART_TOKENS, PART_ROWS, thread.pause)
    studio = Studio(model, folder=model.path, parts=parts, limit=MAX_PICTURE, traffic=traffic)

    async def compute(function: Callable[..., Any], *given: Any) -> Any:
        if "question_form" not in vars(studio):  # its own would let a template take all the time
            studio.question_form = await service.chats.question_form()
        return await asyncio.wrap_future(thread.aside(lambda: function(*given)))

    return page_part(studio, compute, state)


async def _page(_request: Request) -> Response:
    """Where the page is."""
    return RedirectResponse(PAGE + "/")


def _refuse(request: Request, status: int, message: str, code: str | None = None) -> Response:
    """Answer with a mistake, in the form of the API that is asked."""
    if request.url.path.startswith(f"{PAGE}/api/"):
        return page_refusal(request, status, message, "no_key" if status == 401 else "")
    return refuse(request, status, message, code)


def _add(app: FastAPI, endpoint: Endpoint) -> None:
    how = "GET" if endpoint.request is None else "POST"
    more: Json = {"responses": {"4XX": {"description": "What can be mended, in a sentence"}}}
    if endpoint.request is not None:
        reference = {"$ref": f"#/components/schemas/{endpoint.request.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        more["requestBody"] = body
    if "{name" in endpoint.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        more["parameters"] = [name]
    for path in (endpoint.path, *endpoint.also):
        app.add_api_route(
            path,
            endpoint.handle,
            methods=[how],
            openapi_extra=more,
            response_model=None,
            include_in_schema=path == endpoint.path,
            summary=(endpoint.handle.__doc__ or "").strip().rstrip("."),
        )


def _describe(app: FastAPI, endpoints: Iterable[Endpoint]) -> None:
    """Have the OpenAPI document hold the requests, which are read without FastAPI's help.

    It would check them on the event loop, and to their last mistake.
    """
    made = app.openapi
    kinds = [(endpoint.request, "validation") for endpoint in endpoints if endpoint.request]

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = made()
            template = "#/components/schemas/{model}"
            _, definitions = models_json_schema(kinds, ref_template=template)  # pyright: ignore[reportArgumentType]
            document.setdefault("components", {})["schemas"] = definitions["$defs"]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


async def _health(_request: Request) -> Response:
    """Whether the server is alive."""
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    """What was counted, for Prometheus."""
    told = await asyncio.to_thread(request.app.state.metrics.text)
    return Response(told, headers={"Content-Type": CONTENT_TYPE})


async def _mistake(request: Request, error: Exception) -> Response:
    if isinstance(error, ValidationError):
        return refuse(request, 400, explained(error))
    return refuse(request, status_of(error), str(error), code_of(error))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        paths = ", ".join(path for path in request.app.state.paths if "{" not in path)
        message = f"there is no {request.url.path[:200]} here; there are {paths}"
    if error.status_code == 405:
        message = f"{request.url.path} is not asked by {request.method}"
    answer = refuse(request, error.status_code, message)
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _failure(request: Request, error: Exception) -> Response:
    return refuse(request, 500, failed(error))
