"""Experts' matrices, packed for the native kernels."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moescope.kernels.cpu import Weights

Pack = Callable[[Tensor], "Weights"]


def expert_reader(state: Mapping[str, Tensor]) -> Callable[[str, int, torch.Size], Tensor]:
    """Return what reads one expert's matrix out of a network's state dict."""

    def read(name: str, expert: int, shape: torch.Size) -> Tensor:
        at, _, part = name.rpartition(".")
        if part == "down_proj":
            return state[name][expert]
        return state[f"{at}.gate_up_proj"][expert].chunk(2)[part == "up_proj"]

    return read


def expert_weights(
    gate: Tensor, up: Tensor, down: Tensor, pack: Pack
) -> "tuple[Weights, Weights, Weights]":
    return pack(gate), pack(up), pack(down)
