"""The command that is being run, as a shell would take it again: what made a file's numbers."""

import shlex
from contextvars import ContextVar

arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
"""What follows `moescope` on the command line; `main.run` sets it."""


def command_line() -> str:
    return shlex.join(["moescope", *arguments.get()])


streams_experts: ContextVar[bool] = ContextVar("streams_experts", default=False)
"""Whether this command leaves experts on the disk, so that its end says what was read."""
