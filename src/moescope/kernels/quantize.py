"""Weight formats smaller than bf16."""

import torch
from torch import Tensor


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `(rows, columns)` to int8 with one float32 scale a row, symmetric around zero.

    Returns:
        The integers, shaped as `weight`, and the scales `(rows, 1)`; their product approximates
        `weight` to within half a scale.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(weight / scale).to(torch.int8), scale


def dequantize_int8(integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_int8` up to rounding, in `dtype`."""
    return (integers.float() * scale).to(dtype)
