"""What every kind of checkpoint offers to whoever fills a network with its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.kernels.blocks import Blocks
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
"""How the network's names of all routed experts' matrices end."""

GATE_UP_BIAS = GATE_UP + "_bias"
GATE = ".experts.gate_proj"
"""Of the gates alone."""


ReadExpert = Callable[[str, int, torch.Size], Tensor]
"""Returns the matrix of one routed expert, whose shape is given, in the exact type."""

ReadBlocks = Callable[[str, int | None], Blocks | None]
"""What `WeightSource.blocks` is."""


class WeightSource(Protocol):
    """A checkpoint, open; tensors go by the network's names.

    Attributes:
        config: the model's shape.
        dtype: to compute in unless asked otherwise.
        files: all that config and weights are read from.
        has_blocks: whether `blocks` returns some of the weights, which the kernels can keep.
    """

    config: ModelConfig
    dtype: torch.dtype
    files: list[Path]

    @property
    def has_blocks(self) -> bool: ...

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor in `dtype`; None takes the narrower of bf16 and float32 that is exact."""
        ...

    def read_expert(
        self, name: str, expert: int, shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        """Return one routed expert's matrix, `name` ending in `gate_proj`, `up_proj`, `down_proj`.

        The others are not read.
        """
        ...

    def blocks(self, name: str, expert: int | None = None) -> Blocks | None:
        """Return what the file holds of a weight; None where it holds it in another arrangement.

        Args:
            name: of a matrix in the network, of routed experts' `gate_proj`, `up_proj` or
                `down_proj`, or of the halves of latent attention's `kv_b_proj`: `k_b_proj`, turned
                round, and `v_b_proj`.
            expert: the one whose matrix is wanted, where there are several.
        """
        ...

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing in the network takes."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """Return the vocabulary; None where there is none."""
        ...

    def generation_defaults(self) -> GenerationDefaults:
        """Return when texts end, and how they are drawn."""
        ...
