"""Mistakes as each API tells them."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.engine.not_finite import NotFinite
from moescope.engine.scheduler import Busy
from moescope.server.chats import TooLong
from moescope.server.requests import TooMuch

_ANTHROPIC = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"} | {
    413: "request_too_large",
    503: "overloaded_error",
}
_TOO_LONG = ("context_full", "memory_full")
"""Codes of the engine's own mistakes that a shorter prompt mends."""


def status_of(error: Exception) -> int:
    """The status of a mistake: the server's where its model computes no numbers."""
    statuses = {Busy: 503, TooMuch: 413, NotFinite: 500}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 400)


def code_of(error: Exception) -> str | None:
    """What clients look for."""
    too_long = isinstance(error, TooLong) or getattr(error, "code", "") in _TOO_LONG
    return "context_length_exceeded" if too_long else None


def failed(error: Exception) -> str:
    """What is told of a defect."""
    return f"the server failed at this ({type(error).__name__}); its terminal says more"


def explanation(path: str, status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """A mistake, in the form of the API that a path belongs to."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    if path.startswith("/api/"):
        return {"error": message}
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {"message": message, "type": kind, "param": None, "code": code or status}
    return {"error": told}


def refuse(request: Request, status: int, message: str, code: str | None = None) -> Response:
    """Answer with a mistake."""
    told = explanation(request.url.path, status, message, code)
    answer = JSONResponse(told, status_code=status)
    if status == 503:
        answer.headers["Retry-After"] = "1"
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
