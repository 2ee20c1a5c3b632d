"""Experts' matrices, packed for the native kernels."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moescope.model.decoder import CausalLM
from moescope.native.network import Packer

if TYPE_CHECKING:
    from moescope.kernels.cpu import Weights

Pack = Callable[[Tensor], "Weights"]

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
"""Sizes of a network that no block or register divides."""


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


def packed_copy(network: CausalLM, weight_format: str = "int8") -> CausalLM:
    """The same network on the native kernels."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    made = copy.deepcopy(network)
    Packer(weight_format).pack(made, state.__getitem__, expert_reader(state))
    return made
