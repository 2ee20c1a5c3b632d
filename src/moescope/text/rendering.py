"""Chat templates in a process that can be ended: questions on stdin, answers on stdout, JSON lines.

A template comes with a model and may never end, or take all memory.
"""

import json
import signal
import sys
from contextlib import suppress
from typing import Any

from moescope.errors import UserError
from moescope.text.chat import render

MEMORY = 2**30
"""Bytes of addresses that the process may have."""


def main() -> None:
    """Answer `{"templates", "messages", "tools", "variables", "seconds"}` until stdin ends.

    Where the system can, a question that takes longer than `seconds` ends the process, whether
    anybody looks after it or not.
    """
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if hasattr(signal, "alarm"):
            signal.alarm(int(asked["seconds"]) + 1)
        answer = _answer(asked)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        return {
            "text": render(
                asked["templates"],
                asked["messages"],
                tools=asked["tools"],
                variables=asked["variables"],
            )
        }
    except UserError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": "the chat template takes more memory than it may; ask for less"}
