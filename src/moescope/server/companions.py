"""The models beside a model: folders whose names begin with its own and a dash."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import open_config
from moescope.text.tokenizer import Tokenizer

Role = Literal["dense", "large", "unbalanced"]
"""`dense`, a twin without routed experts; `large`, one of as many parameters as the mixture has in
all; `unbalanced`, a copy of the same shape that was trained without balancing.
"""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Companion:
    """A model that can be shown beside another one.

    Attributes:
        name: of its folder.
        folder: where it lies.
        role: what it is to the other.
        problem: why it cannot be opened, in a sentence; None where nothing speaks against it.
    """

    name: str
    folder: Path
    role: Role
    problem: str | None = None


def find_companions(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> list[Companion]:
    """Return the first companion of each role beside a model, by name.

    A folder of another vocabulary or shape is none. One that is named `NAME-` and a role but cannot
    be read is one with a problem. What is no `dense` twin only its folder's name can tell.

    Args:
        folder: the model's own.
        config: its shape.
        tokenizer: its vocabulary.
    """
    found: dict[Role, Companion] = {}
    for path in sorted(folder.parent.iterdir()):
        if path.is_dir() and path.name.startswith(f"{folder.name}-"):
            companion = _companion(path, folder.name, config, tokenizer)
            if companion is not None:
                found.setdefault(companion.role, companion)
    return list(found.values())


def _companion(
    path: Path, name: str, config: ModelConfig, tokenizer: Tokenizer
) -> Companion | None:
    named: Role | None = next((role for role in ROLES if path.name == f"{name}-{role}"), None)
    try:
        its_config = open_config(path / "config.json")
        its_tokenizer = Tokenizer.load(path)
    except UserError as error:
        return Companion(path.name, path, named, str(error)) if named else None
    if its_tokenizer.hash != tokenizer.hash or config.n_routed_experts is None:
        return None
    if its_config.n_routed_experts is None:
        return Companion(path.name, path, "large" if named == "large" else "dense")
    if named == "unbalanced" and _routed_shape(its_config) == _routed_shape(config):
        return Companion(path.name, path, named)
    return None


def _routed_shape(config: ModelConfig) -> tuple[list[bool], int | None]:
    layers = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    return layers, config.n_routed_experts
