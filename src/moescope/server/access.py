"""Who may ask: keys, names of the server, pages of other origins, and a server that is ending."""

import asyncio
import hmac
import re
from collections.abc import Callable, Iterable

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope.server.requests import Refuse, own_names, refused_name

DOCS_FILES = "/docs/files"
"""Where the scripts of /docs are, which needs no network."""
PAGE = "/page"
"""Where the page is."""
OPEN = re.compile(
    rf"/health|/docs|{DOCS_FILES}/[^/]+|/openapi\.json|/|{PAGE}/?|{PAGE}/assets/[^/]+"
)
"""Paths that need no key: of the page its files, which say nothing of anybody."""
ENDING = "the server is shutting down; ask again when it is back"


class OthersOrigins(CORSMiddleware):
    """Lets pages of other origins ask the model, but not the page, which shows what others ask."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with or without leave."""
        is_page = scope["type"] == "http" and scope["path"].startswith(PAGE)
        await (self.app if is_page else super().__call__)(scope, receive, send)


class KeyNeeded:
    """Lets only those who know the key ask the model.

    It is sent as `Authorization: Bearer KEY`, or as Anthropic's clients do, in `x-api-key`.

    Args:
        app: what is behind.
        refuse: makes an answer.
        api_key: of all paths but those in OPEN.
        metrics_key: that opens /metrics too.
    """

    def __init__(
        self, app: ASGIApp, refuse: Refuse, api_key: str | None, metrics_key: str | None
    ) -> None:
        self._app, self._refuse = app, refuse
        self._api_key, self._metrics_key = api_key, metrics_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not OPEN.fullmatch(scope["path"]):
            request = Request(scope)
            keys = [self._api_key]
            if scope["path"] == "/metrics":
                keys.append(self._metrics_key)
            wanted = [key for key in keys if key is not None]
            if wanted and not _knows_one(request, wanted):
                message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                await self._refuse(request, 401, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _knows_one(request: Request, keys: Iterable[str]) -> bool:
    bearer = re.fullmatch(r"bearer +(.*)", request.headers.get("authorization", ""), re.I | re.S)
    given = bearer[1] if bearer else request.headers.get("x-api-key", "")
    return any(hmac.compare_digest(given.encode(), key.encode()) for key in keys)


class HostAllowed:
    """Answers only requests that name this machine, an address or a name that was allowed.

    See `requests.OwnHostOnly`: a page elsewhere cannot point a name of its own here and read on.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, names: Iterable[str]) -> None:
        self._app, self._refuse = app, refuse
        self._names = own_names() | {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            request = Request(scope)
            name = refused_name(request, self._names)
            if name is not None:
                message = (
                    f"this server does not answer to the name {name!r}; use its address, or serve "
                    "with --allow-host"
                )
                await self._refuse(request, 400, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OpenOnly:
    """Refuses new requests once the server ends; those that run go on.

    What is cut in the end, since its body or its template takes too long, is told so too.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, is_ending: Callable[[], bool]) -> None:
        self._app, self._refuse, self._is_ending = app, refuse, is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] != "/health" and self._is_ending():
            await self._refuse(Request(scope), 503, ENDING)(scope, receive, send)
            return
        has_begun = False

        async def sending(told: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(told)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if not self._is_ending():
                raise
            if has_begun:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await self._refuse(Request(scope), 503, ENDING)(scope, receive, send)
