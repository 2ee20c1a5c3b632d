"""Answers while they are made: what waits says so, and for who has gone nothing is computed."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

from moescope.errors import UserError
from moescope.server.errors import code_of, explanation, failed, status_of

QUIET_SECONDS = 10.0
"""After which a stream that waits says that it is alive."""
COMMENT = ": still here\n\n"

Result = TypeVar("Result")


def event(told: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event, in ASCII: some clients take U+2028 and its kin for the end of a line."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(told)}\n\n"


def error_event(path: str, error: Exception) -> dict[str, Any]:
    """What went wrong in the middle of a stream."""
    if isinstance(error, UserError):
        return explanation(path, status_of(error), str(error), code_of(error))
    return explanation(path, 500, failed(error))


def streamed(
    events: AsyncIterator[str],
    end: Callable[[], None],
    wrong: Callable[[Exception], str],
    *,
    quiet: str = COMMENT,
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """Answer with events.

    Args:
        events: to send.
        end: called when nobody waits for more.
        wrong: makes the last event of what went wrong.
        quiet: sent while nothing comes; "" for nothing.
        media_type: of the answer.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    lively = _lively(events, end, wrong, quiet)
    return StreamingResponse(lively, media_type=media_type, headers=headers)


async def _lively(
    events: AsyncIterator[str],
    end: Callable[[], None],
    wrong: Callable[[Exception], str],
    quiet: str,
) -> AsyncIterator[str]:
    waiting: asyncio.Task[str | None] | None = None
    try:
        while True:
            waiting = asyncio.create_task(_next(events))
            while not (await asyncio.wait((waiting,), timeout=QUIET_SECONDS))[0]:
                if quiet:
                    yield quiet
            told = waiting.result()
            if told is None:
                return
            yield told
    except UserError as error:
        yield wrong(error)
    except Exception as error:
        yield wrong(error)
        raise
    finally:
        if waiting is not None:
            waiting.cancel()
        end()


async def _next(events: AsyncIterator[str]) -> str | None:
    return await anext(events, None)


async def unless_gone(request: Request, making: Awaitable[Result]) -> Result:
    """Wait for what is made; stop it when nobody waits for it any more."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    made, left = asyncio.ensure_future(making), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait((made, left), return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise HTTPException(499, "the client has gone")
        return made.result()
    finally:
        made.cancel()
        left.cancel()
