"""What all APIs over one model share."""

import time
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from moescope.api import Model
from moescope.engine.sampling import SamplingParams
from moescope.server.chats import Chats
from moescope.server.metrics import Metrics
from moescope.server.model_thread import ModelThread
from moescope.server.requests import Handler
from moescope.server.texts import Texts

MAX_BYTES = 16_000_000
"""Bytes of a request."""

Made = TypeVar("Made")


@dataclass
class Endpoint:
    """Where to ask, with what.

    Attributes:
        path: from the server's root.
        handle: answers.
        request: what is sent; None for a GET.
        also: other paths with the same answer, which the description leaves out.
    """

    path: str
    handle: Handler
    request: type[BaseModel] | None = None
    also: tuple[str, ...] = field(default=())


class Service:
    """One model, as it is asked.

    Attributes:
        model: what is asked.
        name: what it is called.
        chats: that begin answers.
        metrics: what is counted.
        since: when it was first there, in seconds of Unix time.
    """

    def __init__(self, model: Model, thread: ModelThread, name: str, metrics: Metrics) -> None:
        self.model, self.name, self.metrics = model, name, metrics
        self.chats = Chats(model, thread, metrics)
        self.since = int(time.time())
        self._thread = thread

    def check_name(self, name: str | None) -> None:
        """Refuse the name of another model.

        Raises:
            HTTPException: it is not this one's.
        """
        if name not in (None, "", self.name):
            message = f"there is no model {name[:200]!r} here; ask for {self.name!r}"
            raise HTTPException(404, message)

    async def begin(
        self, arrived: float, prompts: list[list[int]], params: list[SamplingParams]
    ) -> Texts:
        """Begin to continue prompts, each in all ways of `params`."""
        return await Texts.begin(self._thread, self.metrics, arrived, prompts, params)


async def collected(made: AsyncIterable[Made]) -> list[Made]:
    """Wait for all of what is made."""
    return [one async for one in made]
