"""What all APIs over one model share."""

import time
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from moescope.api import Model
from moescope.server.chats import Chats
from moescope.server.requests import Handler
from moescope.server.texts import Desk

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
        desk: where its texts are asked for.
        chats: that begin answers.
        since: when it was first there, in seconds of Unix time.
    """

    def __init__(self, model: Model, desk: Desk, name: str) -> None:
        self.model, self.desk, self.name = model, desk, name
        self.chats = Chats(model, desk)
        self.since = int(time.time())

    def check_name(self, name: str | None) -> None:
        """Refuse the name of another model.

        Raises:
            HTTPException: it is not this one's.
        """
        if name not in (None, "", self.name):
            message = f"there is no model {name[:200]!r} here; ask for {self.name!r}"
            raise HTTPException(404, message)


async def collected(made: AsyncIterable[Made]) -> list[Made]:
    """Wait for all of what is made."""
    return [one async for one in made]
