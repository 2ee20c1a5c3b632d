"""The built page: its files, packed for the wire and kept by browsers as long as they may be."""

import gzip
import hashlib
import mimetypes
import re
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from moescope.server.schema import LANGUAGES, Language

PAGE = Path(__file__).with_name("page")
NOT_BUILT = (
    "The page has not been built. In a checkout of moescope, run `python web/build.py` and load "
    "this address again; the API under /api works without it.\n"
    "网页尚未构建：请在 moescope 源码目录运行 `python web/build.py`，然后刷新本页。\n"
)
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'self'"
)
PRELOAD = re.compile(rb'<link rel="preload" as="fetch"[^>]*>')
"""What has a browser ask the page's API before any script runs."""
TEXT_SUFFIXES = {".html", ".js", ".css", ".svg", ".json", ".txt", ".map"}


async def serve_page(request: Request) -> Response:
    """Answer with the file that the path names; the bare address is the reader's language's."""
    name = request.path_params.get("name") or f"index.{_language(request)}.html"
    path = (PAGE / name).resolve()
    if not path.is_file() or not path.is_relative_to(PAGE.resolve()):
        if not (PAGE / "index.en.html").is_file():
            return PlainTextResponse(NOT_BUILT, status_code=503)
        return PlainTextResponse(f"There is no {name} here.\n", status_code=404)
    alone = not request.scope.get("root_path")
    plain, packed, tag = _contents(path, path.stat().st_mtime_ns, alone)
    kept = "public, max-age=31536000, immutable" if name.startswith("assets/") else "no-cache"
    headers = {"ETag": tag, "Cache-Control": kept, "Vary": "Accept-Encoding, Accept-Language"}
    if name.endswith(".html"):
        headers["Content-Security-Policy"] = POLICY
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    body = plain
    if packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        body = packed
        headers["Content-Encoding"] = "gzip"
    return Response(body, headers=headers, media_type=mimetypes.guess_type(name)[0])


def _language(request: Request) -> Language:
    """What the address asks for, else what the browser likes best."""
    asked = request.query_params.get("lang")
    if asked in LANGUAGES:
        return asked
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


@lru_cache(maxsize=64)
def _contents(path: Path, _changed: int, alone: bool) -> tuple[bytes, bytes | None, str]:
    """The file's bytes, the same packed if that is worth it, and a tag that changes with them.

    As a part of another application, which may want a key, the page asks for nothing before it can
    send one.
    """
    plain = path.read_bytes()
    if path.suffix == ".html" and not alone:
        plain = PRELOAD.sub(b"", plain)
    packed = gzip.compress(plain, mtime=0) if path.suffix in TEXT_SUFFIXES else None
    return plain, packed, f'"{hashlib.sha256(plain).hexdigest()[:24]}"'
