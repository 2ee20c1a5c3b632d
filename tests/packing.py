"""Experts' matrices, packed for the native kernels."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moescope.kernels.cpu import Weights

Pack = Callable[[Tensor], "Weights"]


def expert_weights(
    gate: Tensor, up: Tensor, down: Tensor, pack: Pack
) -> "tuple[Weights, Weights, Weights]":
    return pack(gate), pack(up), pack(down)
