"""What the fields of all APIs' requests are made of.

Checks end at the first thing in a list that is wrong, so that what is wrong costs no more than what
is right.
"""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Strict


class First(FailFast):
    """Ends the check of a list at its first mistake; can be hashed, as parts of unions must be."""

    def __hash__(self) -> int:
        return id(self)


Item = TypeVar("Item")
List = Annotated[list[Item], First()]
Id = Annotated[int, Strict()]


class Lenient(BaseModel):
    """A part of a request, other fields of which are passed over."""

    model_config = ConfigDict(extra="ignore")
