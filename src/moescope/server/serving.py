"""From an application to an address: a free port, a browser, and an end at Ctrl-C."""

import asyncio
import errno
import ipaddress
import os
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from moescope.api import Model
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.machine import memory
from moescope.server.access import PAGE
from moescope.server.apis import Access, create_api
from moescope.server.app import create_app
from moescope.server.connections import ACCEPTED_AT_ONCE, impatient, raise_file_limit
from moescope.server.model_thread import ModelThread
from moescope.server.requests import PATIENCE
from moescope.server.studio import Studio

PORTS_TRIED = 100
CACHE_SHARE = 0.5
"""Of the memory that is free once the model is loaded, what the slots of all caches may take; more
is left for slots ahead of need and for what is held twice while it moves.
"""
MAX_QUEUED = 128
"""Connections that may wait to be accepted."""
SECONDS_TO_SAY_GOODBYE = 5
"""How long open streams may delay the end."""


def serve(
    studio: Studio, host: str, port: int, say: Callable[[str], None], *, browser: bool
) -> None:
    """Show `studio` at an address until Ctrl-C.

    Args:
        studio: the model and what is known about it.
        host: the address to listen at; 127.0.0.1 is this machine alone.
        port: the first to try; the next free one is taken where it is busy.
        say: told the address, and that a port was busy.
        browser: whether to open one, where there is a display.

    Raises:
        UserError: the host is none of this machine's, or no port is free.
    """
    listener = listen(host, port)
    found = listener.getsockname()[1]
    if found != port and port:
        say(f"port {port} is busy; taking {found}")
    address = f"http://{_reachable(host)}:{found}"
    say(f"moescope shows {studio.model.name} at {address}  (Ctrl-C ends)")
    if browser and has_display():
        webbrowser.open(address)
    _run(create_app(studio), listener)


def serve_api(
    model: Model,
    host: str,
    port: int,
    say: Callable[[str], None],
    *,
    name: str,
    access: Access,
    insecure: bool,
    grace: float,
    max_batch: int,
    cache_bytes: int | None = None,
    watch: bool = False,
) -> None:
    """Answer the APIs for `model` at an address until Ctrl-C or SIGTERM.

    Args:
        model: what is asked.
        host: the address to listen at; 127.0.0.1 is this machine alone.
        port: that clients know; 0 takes any that is free.
        say: told the address.
        name: what the API calls the model.
        access: who may ask.
        insecure: whether everybody who reaches an address beyond this machine may ask.
        grace: seconds in which requests that run may end once the server does.
        max_batch: texts that are continued at a time.
        cache_bytes: that all texts may take; None for `CACHE_SHARE` of the memory that is free.
        watch: whether the page shows what is asked to all who may ask.

    Raises:
        UserError: as `serve`; the model has no tokenizer; the key in MOESCOPE_API_KEY or `access`
            cannot be sent, or there is
            none where others can reach the address.
    """
    _ = model.tokenizer  # a model without one is refused before anything is started
    if access.api_key is None and os.environ.get("MOESCOPE_API_KEY") == "":
        raise UserError("MOESCOPE_API_KEY is set but empty; give a key, or unset it to need none")
    for key in (access.api_key, access.metrics_key):
        if key is not None and not _can_be_sent(key):
            raise UserError(
                "the API key is empty or holds what a header cannot carry; use plain ASCII"
            )
    if access.api_key is None and not insecure and not _is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines, and no key is needed to ask; give one in "
            "MOESCOPE_API_KEY or with --api-key, or say --insecure"
        )
    listener = listen(host, port, tries=1)
    if cache_bytes is None:
        # Mapped weights count as free memory until they have moved to pages of their own.
        mapped = cpu.unsettled() if cpu.available() else 0
        cache_bytes = int(max(0, memory()[1] - mapped) * CACHE_SHARE)
    thread = ModelThread(model.engine, max_batch, cache_bytes)
    bound, found = listener.getsockname()[:2]
    shown = f"[{bound}]" if ":" in bound else bound
    say(f"moescope serves {name} at http://{shown}:{found}/v1  (Ctrl-C ends)")
    say(f"moescope: the page is at http://{shown}:{found}{PAGE}/")
    if watch:
        say("moescope: --watch: whoever may ask the model can read what others ask and are told")
    if access.api_key is None and insecure and not _is_loopback(host):
        say("moescope: no key is needed: everybody who reaches this address may ask the model")
    app = create_api(model, thread, name=name, access=access, watch=watch)
    _run(app, listener, patience=access.patience, grace=grace, close=thread.close)


def _run(
    app: Starlette,
    listener: socket.socket,
    *,
    patience: float = PATIENCE,
    grace: float = 0.0,
    close: Callable[[], None] = lambda: None,
) -> None:
    raise_file_limit()
    config = uvicorn.Config(
        app,
        http=impatient(patience),
        proxy_headers=False,
        log_level="warning",
        access_log=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=SECONDS_TO_SAY_GOODBYE,
    )
    with listener, suppress(KeyboardInterrupt):
        _Server(config, app, grace, close).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends by and by: new requests are refused, those that run have a time of grace.

    Once that is over, or nothing runs, `close` has what still runs told that the server ends.
    """

    def __init__(
        self, config: uvicorn.Config, app: Starlette, grace: float, close: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._app_state, self._grace, self._close = app.state, grace, close
        self._ends_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer; more may queue than asyncio accepts before it looks at any."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(MAX_QUEUED)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; without grace where asked again, and at once where once more."""
        self._app_state.ending = True
        if self.should_exit:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        grace = self._grace if self._ends_at is None else 0.0
        self._ends_at = time.monotonic() + grace

    async def on_tick(self, counter: int) -> bool:
        """Look whether the time has come."""
        if self._ends_at is not None and not self.should_exit:
            is_over = time.monotonic() > self._ends_at
            if is_over or not self.server_state.tasks:
                await asyncio.to_thread(self._close)
                self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int, tries: int | None = None) -> socket.socket:
    """Return a socket that listens at `host` and at `port`, or at the next free one.

    Args:
        host: an address of this machine.
        port: the first to try.
        tries: ports to try; None for `PORTS_TRIED`.

    Raises:
        UserError: the host is none of this machine's, or none of the ports is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tries = tries or PORTS_TRIED
    for candidate in range(port, min(port + tries, 65_536)):
        # asyncio sends small answers at once (TCP_NODELAY) only where the protocol is named.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(MAX_QUEUED)
        except PermissionError as error:
            listener.close()
            raise UserError(
                f"port {candidate} may not be used by you; give one from 1024 on"
            ) from error
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"cannot listen at {host} ({error.strerror or error}); give an address of this "
                    "machine, as 127.0.0.1"
                ) from error
        else:
            return listener
    busy = f"port {port} is busy" if tries == 1 else f"no port from {port} on is free"
    raise UserError(f"{busy}; give another one with --port")


def has_display() -> bool:
    """Whether a browser could show itself."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def shown_beside(run: Path, say: Callable[[str], None], *, model: str = "tiny") -> Generator[None]:
    """While entered, a process of its own shows the training in the folder `run`.

    It reads the metrics as they are written, computes in one thread and gives way to the
    training, which knows nothing of it. The rest of the page shows `model`.
    """
    script = "import os; os.nice(10) if hasattr(os, 'nice') else None; "
    script += "from moescope.cli.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", script, "open", model, "--watch", str(run)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            say(line.rstrip())
            if "http://" in line:
                break
        yield
    finally:
        child.terminate()
        child.wait()


def _is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _can_be_sent(api_key: str) -> bool:
    """Whether a header can carry a key as it is; blanks around it would be lost."""
    plain = api_key.isascii() and api_key.isprintable()
    return plain and api_key == api_key.strip() and api_key != ""


def _reachable(host: str) -> str:
    """The address to type for one that is listened at."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
