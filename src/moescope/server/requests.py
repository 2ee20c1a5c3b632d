"""What every server here asks of a request before it looks at what is asked."""

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moescope.errors import UserError

Question = TypeVar("Question", bound=BaseModel)
Refuse = Callable[[Request, int, str], Response]
Handler = Callable[[Request], Awaitable[Response]]


class TooMuch(UserError):
    """A request is larger than any that makes sense."""


async def read_json(request: Request, kind: type[Question], most_bytes: int) -> Question:
    """Read a JSON body.

    Raises:
        HTTPException: it is not called JSON; nothing that a page elsewhere may send unasked is.
        TooMuch: it has more than `most_bytes`.
        ValidationError: it is not what `kind` says.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the question as application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise TooMuch(f"the request is larger than {most_bytes:,} bytes; shorten the text")
    return kind.model_validate_json(bytes(body))


def explained(error: ValidationError) -> str:
    """Say in a sentence what is wrong with a request, without repeating all of it."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"`{place}`: {message}" if place else f"the request: {message}"


class OwnHostOnly:
    """Answers only requests that name this machine or an address, not somebody else's domain.

    A page elsewhere can point its own domain at 127.0.0.1 and would then be allowed to read what
    this server says ("DNS rebinding"); but it cannot make the browser name another host.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, way_out: str = "use its address") -> None:
        self._app, self._refuse, self._way_out = app, refuse, way_out
        self._names = {"localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            request = Request(scope)
            host = request.url.hostname or ""
            if host.lower() not in self._names and not _is_address(host):
                message = f"this server does not answer to the name {host!r}; {self._way_out}"
                await self._refuse(request, 400, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
