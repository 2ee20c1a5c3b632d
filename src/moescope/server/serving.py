"""From an application to an address: a free port, a browser, and an end at Ctrl-C."""

import errno
import os
import socket
import subprocess
import sys
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
from moescope.server.app import create_app
from moescope.server.model_thread import ModelThread
from moescope.server.openai import create_api
from moescope.server.studio import Studio

PORTS_TRIED = 100
CACHE_SHARE = 0.5
"""Of the memory that is free once the model is loaded, what the slots of all caches may take; more
is left for slots ahead of need and for what is held twice while it moves.
"""
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
    api_key: str | None,
    max_batch: int,
) -> None:
    """Answer the OpenAI API for `model` at an address until Ctrl-C.

    Args:
        model: what is asked.
        host: the address to listen at; 127.0.0.1 is this machine alone.
        port: that clients know; 0 takes any that is free.
        say: told the address.
        name: what the API calls the model.
        api_key: what every request must carry; None if none need.
        max_batch: texts that are continued at a time.

    Raises:
        UserError: the host is none of this machine's, the port is busy, the key cannot be sent, or
            the model has no tokenizer.
    """
    _ = model.tokenizer
    if api_key is None and os.environ.get("MOESCOPE_API_KEY") == "":
        raise UserError("MOESCOPE_API_KEY is set but empty; give a key, or unset it to need none")
    if api_key is not None and not _can_be_sent(api_key):
        raise UserError("the API key is empty or holds what a header cannot carry; use plain ASCII")
    listener = listen(host, port, tries=1)
    # Mapped weights count as free memory until they have moved to pages of their own.
    mapped = cpu.unsettled() if cpu.available() else 0
    room = int(max(0, memory()[1] - mapped) * CACHE_SHARE)
    thread = ModelThread(model.engine, max_batch, room)
    found = listener.getsockname()[1]
    say(f"moescope serves {name} at http://{_reachable(host)}:{found}/v1  (Ctrl-C ends)")
    _run(create_api(model, thread, name=name, api_key=api_key), listener)


def _run(app: Starlette, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        proxy_headers=False,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_SAY_GOODBYE,
    )
    with listener, suppress(KeyboardInterrupt):
        _Server(config, app).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Lets streams that would go on for long end by themselves."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._state = app.state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.ending = True
        super().handle_exit(sig, frame)


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
            listener.listen(128)
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


def _can_be_sent(api_key: str) -> bool:
    """Whether a header can carry a key as it is; blanks around it would be lost."""
    plain = api_key.isascii() and api_key.isprintable()
    return plain and api_key == api_key.strip() and api_key != ""


def _reachable(host: str) -> str:
    """The address to type for one that is listened at."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
