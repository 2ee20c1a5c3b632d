"""A server on this machine that speaks as much of the Hub's API as its library asks for."""

import hashlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_member"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
CHUNK = 1 << 14


class Broken(Exception):
    """The connection is cut."""


@dataclass
class Hub:
    """What the server shows, and what was asked of it.

    Attributes:
        endpoint: its address.
        repos: folders by `org/name`.
        gated: of them, those that want a token for every file.
        ignores_ranges: whether it sends whole files always.
        cut_after: bytes of a file after which the next so many connections break, by path.
        served: bytes of every file that were sent.
        requests: method and path of every request.
    """

    endpoint: str = ""
    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    cut_after: dict[str, tuple[int, int]] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def info(self, request: Request) -> Response:
        repo = f"{request.path_params['org']}/{request.path_params['name']}"
        self.requests.append((request.method, request.url.path))
        if repo not in self.repos:
            return _refusal(401, "RepoNotFound")
        files = [_described(self.repos[repo], path) for path in _files(self.repos[repo])]
        gated = "manual" if repo in self.gated else False
        return JSONResponse({"id": repo, "sha": COMMIT, "gated": gated, "siblings": files})

    def tree(self, request: Request) -> Response:
        repo = f"{request.path_params['org']}/{request.path_params['name']}"
        folder = self.repos[repo]
        described = [_described(folder, path) for path in _files(folder)]
        return JSONResponse(
            [
                {"type": "file", "path": d["rfilename"], "size": d["size"], "oid": d["blobId"]}
                | ({"lfs": d["lfs"] | {"oid": d["lfs"]["sha256"]}} if "lfs" in d else {})
                for d in described
            ]
        )

    def file(self, request: Request) -> Response:
        repo = f"{request.path_params['org']}/{request.path_params['name']}"
        self.requests.append((request.method, request.url.path))
        if repo in self.gated and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _refusal(401, "GatedRepo")
        name = request.path_params["path"]
        path = self.repos[repo] / name
        if not path.is_file():
            return _refusal(404, "EntryNotFound")
        described = _described(self.repos[repo], path)
        etag = described.get("lfs", {}).get("sha256", described["blobId"])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        size, start, stop = described["size"], 0, described["size"]
        asked = RANGE.fullmatch(request.headers.get("range", ""))
        status = 206 if asked and not self.ignores_ranges else 200
        if asked and status == 206:
            start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers["Content-Length"] = str(stop - start)
        if request.method == "HEAD":
            return Response(headers=headers)
        return StreamingResponse(self._bytes(path, name, start, stop), status, headers)

    def _bytes(self, path: Path, name: str, start: int, stop: int) -> Iterator[bytes]:
        end, times = self.cut_after.get(name, (stop, 0))
        cut = times > 0 and end < stop
        if cut:
            self.cut_after[name] = (end, times - 1)
        with path.open("rb") as file:
            for at in range(start, min(stop, max(end, start)) if cut else stop, CHUNK):
                file.seek(at)
                chunk = file.read(min(CHUNK, stop - at))
                self.served[name] += len(chunk)
                yield chunk
        if cut:
            raise Broken


def _refusal(status: int, code: str) -> Response:
    return JSONResponse({"error": code}, status, {"X-Error-Code": code})


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _described(folder: Path, path: Path) -> dict:
    content = path.read_bytes()
    described = {
        "rfilename": path.relative_to(folder).as_posix(),
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if path.suffix in (".safetensors", ".gguf"):
        sha256 = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return described


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    routes = [
        Route("/api/models/{org}/{name}", hub.info),
        Route("/api/models/{org}/{name}/revision/{revision}", hub.info),
        Route("/api/models/{org}/{name}/tree/{revision}", hub.tree),
        Route("/{org}/{name}/resolve/{revision}/{path:path}", hub.file, methods=["GET", "HEAD"]),
    ]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        hub.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()


def point_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library believe that HF_ENDPOINT and HF_HUB_CACHE were set from the start."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
