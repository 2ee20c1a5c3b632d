"""What the fields of all APIs' requests are made of.

Checks end at the first thing in a list that is wrong, and at the first field that is unknown, so
that what is wrong costs no more than what is right.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Strict, model_validator


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


class Message(BaseModel):
    """What the page and the server say to each other; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, fields: Any) -> Any:
        """Refuse the first unknown field; pydantic alone would tell of each."""
        if isinstance(fields, dict):
            for name in fields:
                if name not in cls.model_fields:
                    raise ValueError(f"there is no field {str(name)[:60]!r} here; leave it out")
        return fields
