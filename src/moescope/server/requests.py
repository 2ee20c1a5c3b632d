"""What every server here asks of a request before it looks at what is asked."""

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moescope.errors import UserError

Question = TypeVar("Question", bound=BaseModel)
Refuse = Callable[[Request, int, str], Response]
Handler = Callable[[Request], Awaitable[Response]]


class TooMuch(UserError):
    """A request is larger than any that makes sense."""


class NotThere(UserError):
    """What was asked for does not exist here."""


PATIENCE = 10.0
"""Seconds in which a request's head and body must come; a server's `state.patience` may differ."""
BYTES_PER_SECOND = 100_000
"""A body has a second more for each of so many bytes that it has sent."""
LONGEST_NAME = 60
"""Characters that a mistake repeats of a name that was sent."""


async def read_json(request: Request, kind: type[Question], most_bytes: int) -> Question:
    """Read a JSON body; it is checked in a thread, up to the first thing that is wrong.

    Raises:
        HTTPException: it is not called JSON (nothing that a page elsewhere may send unasked is),
            comes too slowly, or its sender has gone.
        TooMuch: it has more than `most_bytes`.
        ValidationError: it is not what `kind` says.
        UserError: a number in it is not finite.
    """
    kind_sent = request.headers.get("content-type", "").partition(";")[0]
    if kind_sent.strip().lower() != "application/json":
        raise HTTPException(415, "send the question as application/json")
    body = await read_body(request, most_bytes)
    return await asyncio.to_thread(_checked, kind, body)


def _checked(kind: type[Question], body: bytes) -> Question:
    """Read JSON whose numbers can be told again: pydantic's parser also takes NaN and 1e999."""
    asked = kind.model_validate_json(body)
    try:
        json.dumps(from_json(body), allow_nan=False)
    except ValueError as error:
        raise UserError(
            "a number in the request is not finite, as 1e999; send finite ones"
        ) from error
    return asked


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Read a body, in the time that it may take.

    Raises:
        HTTPException: it comes too slowly, or its sender has gone.
        TooMuch: it has more than `most_bytes`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal() and len(declared) < 20:
        _check_size(int(declared), most_bytes)
    begun = asyncio.get_running_loop().time()
    patience: float = getattr(request.app.state, "patience", PATIENCE)
    body = bytearray()
    try:
        async with asyncio.timeout_at(begun + patience) as limit:
            async for chunk in request.stream():
                body += chunk
                _check_size(len(body), most_bytes)
                limit.reschedule(begun + patience + len(body) / BYTES_PER_SECOND)
    except TimeoutError as error:
        message = f"the request did not come within {patience:g} s; send it at once"
        raise HTTPException(408, message, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(499, "the client has gone") from error
    return bytes(body)


def _check_size(size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise TooMuch(f"the request is larger than {most_bytes:,} bytes; shorten the text")


def explained(error: ValidationError) -> str:
    """Say in a sentence what is wrong with a request, without repeating all of it."""
    # Of the ways in which each kind of a union fails, the one that got furthest says most.
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    place = ".".join(_named(part) for part in first["loc"] if "[" not in str(part))
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"`{place}`: {message}" if place else f"the request: {message}"


def _named(part: int | str) -> str:
    """A place's name, which may be what was sent, as far as one has to read it."""
    name = str(part)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


class OwnHostOnly:
    """Answers only requests that name this machine or an address, not somebody else's domain.

    A page elsewhere can point its own domain at 127.0.0.1 and would then be allowed to read what
    this server says ("DNS rebinding"); but it cannot make the browser name another host.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, way_out: str = "use its address") -> None:
        self._app, self._refuse, self._way_out = app, refuse, way_out
        self._names = own_names()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            request = Request(scope)
            host = refused_name(request, self._names)
            if host is not None:
                message = f"this server does not answer to the name {host!r}; {self._way_out}"
                await self._refuse(request, 400, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def own_names() -> set[str]:
    """Names by which this machine calls itself."""
    return {"localhost", socket.gethostname().lower()}


def refused_name(request: Request, names: set[str]) -> str | None:
    """The name that a request asks for, as it was sent, if it is neither an address nor known."""
    sent = request.headers.getlist("host")
    host = sent[0] if len(sent) == 1 else ", ".join(sent)
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/?#\s,]+))(?::\d{1,5})?", host)
    name = (parts[1] or parts[2]) if parts else host
    known = parts is not None and (name.lower() in names or _is_address(name))
    return None if known else name[:100]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
