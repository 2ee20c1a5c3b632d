"""The list of all fields of a training's TOML file, made from the tables' own declarations."""

import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moescope.config import ModelConfig
from moescope.training.config import (
    BalanceConfig,
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    ParallelConfig,
    RlConfig,
    StartConfig,
    TrainConfig,
    TrainingConfig,
)

TABLES: dict[str, type[BaseModel]] = {
    "start": StartConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "balance": BalanceConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointsConfig,
    "parallel": ParallelConfig,
    "rl": RlConfig,
    "model": ModelConfig,
}
WIDTH = 100


def describe_fields() -> str:
    """Return the kinds and every table with its fields: name, type, value if left out, meaning."""
    kind = TrainConfig.model_fields["kind"]
    head = f"kind = {_type(kind.annotation)}, {_default(kind)}"
    before = [head, *_wrapped(_told(TrainConfig.__doc__ or "")["kind"]), ""]
    tables = "\n\n".join(_table(name, table) for name, table in TABLES.items())
    return "\n".join([*before, tables]) + "\n"


def _table(name: str, table: type[BaseModel]) -> str:
    told = _told(table.__doc__ or "")
    lines = [f"[{name}]  {_purpose(table.__doc__ or '')}"]
    for field, info in table.model_fields.items():
        head = f"  {field} = {_type(info.annotation)}, {_default(info)}"
        lines += [head, *_wrapped(told.get(field, ""))]
    return "\n".join(lines)


def _purpose(doc: str) -> str:
    """The first sentence of a docstring, without the table's name that it may begin with."""
    first = " ".join(doc.split("\n\n")[0].split())
    text = re.sub(r"^`\[\w+\]`: ", "", first)
    return text[0].upper() + text[1:]


def _told(doc: str) -> dict[str, str]:
    """What the section Attributes says of each name; a line may speak of several."""
    section = doc.partition("Attributes:")[2]
    told: dict[str, str] = {}
    for entry in re.split(r"\n(?= {8}\w)", section):
        names, colon, text = entry.strip().partition(": ")
        if colon:
            told |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return told


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{choice}"' for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(one) for one in arguments if one is not type(None))
    if origin is dict:
        return "table of numbers"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return {Path: "path", str: "text"}.get(annotation, getattr(annotation, "__name__", "value"))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is None:
        return "may be left out"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{shown} if left out" if shown else "may be left out"


def _wrapped(text: str) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return lines
