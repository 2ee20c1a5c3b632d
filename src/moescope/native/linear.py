"""Linear maps with packed weights, and what other packed modules share."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moescope.kernels import cpu
from moescope.native.reader import Matrices, Stack

Pack = Callable[[Matrices | Stack], "cpu.Weights"]
"""Packs matrices, or hands out what was packed before."""


class PackedLinear(nn.Linear):
    """A linear map with packed weights, `(outputs, columns)` or `(matrices, outputs, columns)`."""

    def __init__(self, weight: Matrices, bias: Tensor | None, pack: Pack) -> None:
        outputs, columns = weight.shape[:-1].numel(), weight.shape[-1]
        super().__init__(columns, outputs, bias=False, device="meta")
        self.weight = stand_in(outputs, columns)
        self.packed = pack(weight)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., columns)` to `(..., outputs)` float32."""
        return cpu.linear(self.packed, self.out_features, input, self.bias)


class NativeGroupedLinear(nn.Module):
    """A packed map of each group by itself."""

    def __init__(self, weight: Tensor, groups: int, pack: Pack) -> None:
        super().__init__()
        self.maps = nn.ModuleList(PackedLinear(part, None, pack) for part in weight.chunk(groups))

    def forward(self, input: Tensor) -> Tensor:
        """Map `(batch, seq, groups, inputs)` to `(batch, seq, groups * outputs)`."""
        outputs = [mapped(input[:, :, at]) for at, mapped in enumerate(self.maps)]
        return torch.cat(outputs, dim=-1)


def parts(linear: nn.Linear) -> "tuple[cpu.Weights, Tensor | None]":
    return cast(PackedLinear, linear).packed, linear.bias


def wide(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter in float32."""
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().float(), requires_grad=False)


def stand_in(*shape: int) -> nn.Parameter:
    """A parameter that keeps counts and devices right where the weights are packed.

    It takes four bytes, and whoever computes with it by mistake sees NaN.
    """
    return nn.Parameter(torch.full((), torch.nan).expand(shape), requires_grad=False)


def is_stand_in(parameter: Tensor) -> bool:
    """Whether a parameter stands where weights are packed."""
    return parameter.numel() > 1 and not any(parameter.stride())


def drop_parameters(module: nn.Module) -> None:
    """Put stand-ins in the place of a module's parameters."""
    for name, parameter in list(module.named_parameters()):
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, stand_in(*parameter.shape))
