"""Chat templates off the event loop, with a budget of time and memory."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moescope.errors import UserError
from moescope.text.tokenizer import Tokenizer

SECONDS = 5.0
"""That a template may take."""
PROCESSES = 2
MAX_LINE = 2**26


class Templates:
    """Renders a tokenizer's chat templates in processes of their own.

    Args:
        tokenizer: whose templates.
        seconds: after which a process is ended.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._all = [_Process() for _ in range(PROCESSES)]
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        for process in self._all:
            self._idle.put_nowait(process)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Return what a template makes of messages, with `variables` beside them.

        Raises:
            UserError: there is no template, it refuses the messages, or takes too long.
        """
        asked = {
            "templates": self._tokenizer.chat_templates,
            "messages": messages,
            "tools": tools,
            "variables": self._tokenizer.chat_variables(variables),
            "seconds": self._seconds,
        }
        line = await asyncio.to_thread(lambda: json.dumps(asked).encode() + b"\n")
        process = await self._idle.get()
        try:
            answer = await process.ask(line, self._seconds)
        finally:
            self._idle.put_nowait(process)
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer["text"]

    async def close(self) -> None:
        """End the processes."""
        for process in self._all:
            await process.end()


class _Process:
    """A process that renders, one question after the other; begun when it is needed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, line: bytes, seconds: float) -> dict[str, str]:
        try:
            if self._process is None or self._process.returncode is not None:
                self._process = await self._begin()
            assert self._process.stdin is not None and self._process.stdout is not None
            async with asyncio.timeout(seconds):
                self._process.stdin.write(line)
                await self._process.stdin.drain()
                answer = await self._process.stdout.readline()
        except TimeoutError as error:
            await self.end()
            raise UserError(
                f"the chat template took longer than {seconds:g} s for these messages; send fewer, "
                "or give a plain prompt"
            ) from error
        except (ConnectionError, ValueError):
            answer = b""
        except BaseException:  # an answer that nobody waits for may not become the next one's
            await self.end()
            raise
        if not answer.endswith(b"\n"):
            await self.end()
            raise UserError(
                "the chat template ended its process, by memory or time; send fewer messages"
            )
        return json.loads(answer)

    async def _begin(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from moescope.text.rendering import main; main()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=MAX_LINE,
            start_new_session=True,  # Ctrl-C is for the server
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"templates": {}, "messages": [], "tools": null, "variables": {}, ')
        process.stdin.write(b'"seconds": 60}\n')
        await process.stdout.readline()  # it has begun; that time is not the template's
        return process

    async def end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
