"""What a family is: how its `config.json` and its tensors are spelled, in and out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from moescope.config import ModelConfig

Fields = dict[str, Any]
"""Of a `config.json`, or of `ModelConfig`."""


@dataclass(frozen=True)
class ExpertTensors:
    """Where a layer's routed experts stand: a matrix an expert, or all of them in one tensor.

    Attributes:
        gate: name behind `model.layers.N.` of `(moe_intermediate_size, hidden)`, where
            `{expert}` stands for the number.
        up: likewise.
        down: likewise, `(hidden, moe_intermediate_size)`.
        gate_up: of `(experts, 2 * moe_intermediate_size, hidden)`, gate rows before up rows, where
            all experts stand in one tensor; `down` is `(experts, hidden, moe_intermediate_size)`
            then.
        transposed: whether the last two dimensions of stacked tensors stand the other way round,
            with the outputs of gate and up taking turns.
    """

    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"
    gate_up: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Tensors:
    """How a family's safetensors name what the network calls otherwise.

    Attributes:
        in_layer: the network's name behind `model.layers.N.` -> the published one.
        experts: the layout of the routed experts.
        prefix: what may stand before every name, where the model is a part of a larger one.
        leading: published names of tensors with a further dimension of one in front.
        beginnings: how published names begin -> what stands there in most families.
        unused: how names begin that the network has no place for.
    """

    in_layer: Mapping[str, str] = field(default_factory=dict[str, str])
    experts: ExpertTensors = field(default_factory=ExpertTensors)
    prefix: str = ""
    leading: frozenset[str] = frozenset()
    beginnings: Mapping[str, str] = field(default_factory=dict[str, str])
    unused: tuple[str, ...] = ()


Kind = TypeVar("Kind", int, float, str, bool)


class Metadata(Protocol):
    """The metadata of a GGUF file, by keys without the architecture's name in front."""

    def get(self, key: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """Return a value; without a default, a file that lacks it is refused."""
        ...

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """Return a value, or None."""
        ...

    def holds(self, ending: str) -> bool:
        """Whether the file has a tensor whose name ends so."""
        ...


def _nothing(config: ModelConfig) -> Fields:
    return {}


def _always(config: ModelConfig) -> bool:
    return True


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp keeps a family; an architecture can hold several.

    Attributes:
        architecture: llama.cpp's name.
        read: what the metadata say beyond sizes and experts (`formats.gguf.metadata`) ->
            fields of `ModelConfig`, `model_type` among them.
        write: keys without the architecture's name, beyond those.
        permuted: whether rows of queries and keys stand so that rotated pairs, halves of a head
            in safetensors, are neighbours.
        in_layer: the network's name behind `model.layers.N.`, without `weight` or `bias` ->
            llama.cpp's behind `blk.N.`, where it is another than in most architectures.
        rope_scaling: what a file does not say of its stretched positions.
    """

    architecture: str
    read: Callable[[Metadata], Fields]
    write: Callable[[ModelConfig], Fields] = _nothing
    permuted: bool = False
    in_layer: Mapping[str, str] = field(default_factory=dict[str, str])
    rope_scaling: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        model_type: as `config.json` has it.
        architecture: the class that `transformers` or the publisher gives it.
        read: the fields of its `config.json` -> those of `ModelConfig`.
        write: the way back; `model_type`, `architectures` and what `families.dialect.common` knows
            are added.
        gguf: how llama.cpp keeps it; None if it does not.
        tensors: names in safetensors.
        routes: whether others that open this family route as a mixture's config says, where the
            dialect can say more than they read.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], Fields]
    write: Callable[[ModelConfig], Fields]
    gguf: Gguf | None = None
    tensors: Tensors = field(default_factory=Tensors)
    routes: Callable[[ModelConfig], bool] = _always
