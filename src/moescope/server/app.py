"""The page and its API over HTTP, for the reader's own machine.

The model computes in one thread of its own, one question after the other; a stream takes its turn
again for every token, so that the page stays alive while it runs, and ends when the reader goes.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moescope.errors import UserError
from moescope.scope.history import Follower, planned_steps
from moescope.server import schema
from moescope.server.contract import ENDPOINTS, Endpoint
from moescope.server.fields import Message
from moescope.server.page import serve_page
from moescope.server.requests import (
    Handler,
    NotThere,
    OwnHostOnly,
    TooMuch,
    explained,
    read_json,
)
from moescope.server.schema import LANGUAGES, MAX_TEXT
from moescope.server.studio import Studio, cut
from moescope.server.traffic import Traffic

MOST_BYTES = 4_000_000
"""Bytes of a request; more than MAX_TEXT characters and a context of ids take."""
PREFER_OK = "status=200"
"""The `Prefer` header with which a mistake is answered under status 200, told by its `type` alone:
browsers note every other status in their console, as if the page were broken.
"""
SECONDS_BETWEEN_LOOKS = 0.5
"""How often a running training's metrics, and what others ask, are looked at."""
Compute = Callable[..., Awaitable[Any]]
"""Has the model's thread call a function with what is given."""


def create_app(studio: Studio) -> Starlette:
    """Return the application that shows `studio`.

    Streams end early once its `state.ending` is set.
    """
    thread = ThreadPoolExecutor(
        max_workers=1,
        thread_name_prefix="model",
        initializer=torch.set_num_threads,
        initargs=(studio.threads,),
    )

    async def compute(function: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(thread, function, *given)

    async def prepare() -> None:
        """Compute what the page shows first while it loads, questions between its parts."""
        # What fails here fails again, and is told, when it is asked for.
        with suppress(Exception):
            for language in LANGUAGES:
                await compute(studio.start, language)
            events = studio.generate(studio.hero)
            while await compute(next, events, None) is not None:
                pass

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        first = asyncio.create_task(prepare())
        yield
        first.cancel()
        thread.shutdown(cancel_futures=True)

    app = Starlette(
        routes=page_routes(studio, compute),
        exception_handlers=PAGE_HANDLERS,
        lifespan=lifespan,
    )
    app.state.ending = False
    app.add_middleware(OwnHostOnly, refuse=page_refusal)
    return app


def page_part(studio: Studio, compute: Compute, state: State) -> Starlette:
    """Return the page as a part of another application.

    Args:
        studio: that answers.
        compute: has the model's thread call a function.
        state: of the other application, whose `ending` ends streams.
    """
    app = Starlette(routes=page_routes(studio, compute), exception_handlers=PAGE_HANDLERS)
    app.state = state
    return app


def page_routes(studio: Studio, compute: Compute) -> list[Route]:
    """Return the page's files and its API.

    Args:
        studio: that answers.
        compute: has the model's thread call a function.
    """
    asks: dict[str, Callable[..., Any]] = {
        **{f"/api/start/{language}": partial(studio.start, language) for language in LANGUAGES},
        "/api/model": lambda: studio.info,
        "/api/generate": studio.generate,
        "/api/trace": studio.trace,
        "/api/token": studio.token,
        "/api/expert": studio.expert,
        "/api/cut": cut,
        "/api/specialization": studio.specialization,
        "/api/dense": studio.dense,
        "/api/unbalanced": studio.unbalanced,
        "/api/training": studio.training,
        "/api/reasoning": studio.reasoning,
        "/api/answer": studio.answer,
    }
    follows: dict[str, Callable[[], AsyncIterator[Message | None]]] = {
        "/api/training/live": lambda: _follow(studio.followed),
        "/api/traffic": lambda: _watch(studio.watched),
    }

    def handler_of(endpoint: Endpoint) -> Handler:
        async def handle(request: Request) -> Response:
            if endpoint.path in follows:
                return _events(follows[endpoint.path](), request.app.state)
            asked = [await _read(request, endpoint.request)] if endpoint.request else []
            ask = asks[endpoint.path]
            if endpoint.aside:
                return await _json(await asyncio.to_thread(ask, *asked))
            if not endpoint.streams:
                return await _json(await compute(ask, *asked))
            events: Iterator[Message] = ask(*asked)
            first = await compute(next, events)  # a mistake shows here, before the stream begins
            return _events(_stream(first, events, compute), request.app.state)

        return handle

    routes = [Route(e.path, handler_of(e), methods=[e.method]) for e in ENDPOINTS]
    return [
        *routes,
        Route("/api/{name:path}", _unknown, methods=["GET", "POST", "OPTIONS"]),
        Route("/", serve_page),
        Route("/{name:path}", serve_page),
    ]


# --- requests in, answers out ---------------------------------------------------------------------


async def _read(request: Request, kind: type[Message]) -> Message:
    """Read a JSON body of at most `MOST_BYTES`."""
    try:
        return await read_json(request, kind, MOST_BYTES)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "string_too_long":
            raise TooMuch(
                f"the text has {len(first['input']):,} characters but the page reads {MAX_TEXT:,} "
                "at most; shorten it",
                "text_too_long",
                n=len(first["input"]),
                max=MAX_TEXT,
            ) from error
        raise HTTPException(422, explained(error)) from error


async def _json(answer: Any) -> Response:
    """Write an answer in a thread: a long text's takes its time."""
    told = await asyncio.to_thread(_adapter(type(answer)).dump_json, answer)
    return Response(told, media_type="application/json")


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _events(events: AsyncIterator[Message | None], state: State) -> Response:
    """Stream events; None is a moment without any."""

    async def lines() -> AsyncIterator[str]:
        async for event in events:
            if state.ending:
                return
            if event is not None:
                yield f"data: {event.model_dump_json()}\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _stream(
    first: Message, events: Iterator[Message], compute: Callable[..., Awaitable[Any]]
) -> AsyncIterator[Message]:
    """Hand on events as they are made; a mistake in the middle is the last of them."""
    event: Message | None = first
    try:
        while event is not None:
            yield event
            event = await compute(next, events, None)
    except UserError as error:
        yield schema.ErrorEvent.of(error)


async def _watch(traffic: Traffic) -> AsyncIterator[Message | None]:
    """Hand on what others ask, all of the list at first, then what has changed."""
    clock = -1
    while True:
        clock, changed = traffic.since(clock)
        yield changed
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


async def _follow(run: Path) -> AsyncIterator[Message | None]:
    """Hand on the rows of a running training as they are written, the latest one at once."""
    follower, steps = Follower(run), planned_steps(run)
    rows = (await asyncio.to_thread(follower.new_rows))[-1:]
    while True:
        for row in rows:
            steps = max(steps, row.step)
            yield schema.TrainingEvent(row=row, steps=steps)
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        yield None
        steps = steps or planned_steps(run)
        rows = await asyncio.to_thread(follower.new_rows)


# --- mistakes -------------------------------------------------------------------------------------


def page_refusal(request: Request, status: int, message: str, code: str = "") -> Response:
    """Answer with a mistake, as the page reads it."""
    return _refusal(request, status, UserError(message, code))


def _refusal(request: Request, status: int, error: UserError) -> Response:
    if request.headers.get("prefer") == PREFER_OK:
        status = 200
    return JSONResponse(schema.ErrorEvent.of(error).model_dump(), status_code=status)


async def _mistake(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    status = 404 if isinstance(error, NotThere) else 413 if isinstance(error, TooMuch) else 400
    return _refusal(request, status, error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return page_refusal(request, error.status_code, error.detail)


async def _unknown(request: Request) -> Response:
    path = request.url.path
    if any(path.endswith(endpoint.path) for endpoint in ENDPOINTS):
        return page_refusal(request, 405, f"{path} is not asked by {request.method}")
    return page_refusal(request, 404, f"there is no {path} here")


async def _failure(request: Request, error: Exception) -> Response:
    return page_refusal(
        request, 500, f"the server failed at this ({type(error).__name__}); its terminal says more"
    )


PAGE_HANDLERS: dict[Any, Any] = {
    UserError: _mistake,
    HTTPException: _refused,
    Exception: _failure,
}
