"""Connections that ask for something: the others are closed after a while."""

import asyncio
from contextlib import suppress
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_FILES = 64
"""Files that connections leave to others, and to those that are about to be closed."""
ACCEPTED_AT_ONCE = 8
"""Connections that are accepted before the first is looked at: in a burst those need files, too."""


def raise_file_limit() -> None:
    """Have as many files open as the system lets this process have."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    """Connections for which there are files."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            return max(16, soft - SPARE_FILES)
    return 10_000


def impatient(patience: float) -> type[H11Protocol]:
    """Make a protocol that closes a connection which has sent no whole head for some seconds.

    Where there are as many connections as files, the one that has been idle longest goes.
    """

    class Impatient(H11Protocol):
        """HTTP/1.1, for those who speak."""

        idle_since: float | None = None
        watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._rest()
            if len(self.connections) > max_connections():
                others = (one for one in self.connections if isinstance(one, Impatient))
                idle = [(one.idle_since, id(one), one) for one in others if one is not self]
                resting = [one for one in idle if one[0] is not None]
                if resting:
                    min(resting)[2].abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Typed as always there, but None before the first request.
            cycle = cast("Any", self.cycle)
            if cycle is not None and not cycle.response_complete:
                self._work()

        def on_response_complete(self) -> None:
            self._rest()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._work()
            super().connection_lost(exc)

        def abort(self) -> None:
            """Close at once; of those that rest, it is none any more."""
            self._work()
            self.transport.abort()

        def _rest(self) -> None:
            self._work()
            self.idle_since = self.loop.time()
            self.watch = self.loop.call_later(patience, self.abort)

        def _work(self) -> None:
            self.idle_since = None
            if self.watch is not None:
                self.watch.cancel()
                self.watch = None

    return Impatient
