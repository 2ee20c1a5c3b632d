"""Weight formats smaller than bf16."""

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32
"""Columns that share a scale in int4."""
INT4_CANDIDATES = [6.6 + 0.2 * step for step in range(12)]
"""Where the largest magnitude of a group is tried to come to lie, of eight steps."""


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


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `(..., columns)` to integers from -8 to 7 with one bf16 scale for 32 columns.

    The largest magnitude is tried at several places near -8. An error counts as much as its
    weight's magnitude plus the root mean square of the 32, `c`. With `q` the integers that a
    candidate makes, the best scale for them is `sum(cwq) / sum(cqq)` (least squares), and the
    candidate with the largest `sum(cwq)^2 / sum(cqq)` errs least.

    Returns:
        The integers `(..., groups, 32)` int8, columns padded with zeros, and the scales
        `(..., groups, 1)` bfloat16.
    """
    padding = -weight.shape[-1] % INT4_GROUP
    groups = F.pad(weight.float(), (0, padding)).unflatten(-1, (-1, INT4_GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))  # (..., groups, 1)
    counts = groups.abs() + groups.square().mean(dim=-1, keepdim=True).sqrt()
    best = torch.full_like(extreme, -1)
    scale = torch.zeros_like(extreme)
    for place in INT4_CANDIDATES:
        integers = torch.nan_to_num(groups * (-place / extreme)).round().clamp(-8, 7)
        product = (counts * groups * integers).sum(dim=-1, keepdim=True)
        square = (counts * integers.square()).sum(dim=-1, keepdim=True)
        refit = torch.nan_to_num(product / square)
        explained = product * refit
        scale = torch.where(explained > best, refit, scale)
        best = torch.maximum(best, explained)
    scale = scale.to(torch.bfloat16)
    integers = torch.nan_to_num(groups / scale.float()).round().clamp(-8, 7)
    return integers.to(torch.int8), scale


def dequantize_int4(integers: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_int4` up to rounding: `(..., columns)` in `dtype`."""
    return (integers.float() * scale.float()).flatten(-2)[..., :columns].to(dtype)


def rounded(weight: Tensor, weight_format: str) -> Tensor:
    """`weight` `(..., columns)` as `int8`, `int4` or `bf16` would hold it, in its own type."""
    if weight_format == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    if weight_format == "int8":
        return dequantize_int8(*quantize_int8(weight), weight.dtype)
    return dequantize_int4(*quantize_int4(weight), weight.shape[-1], weight.dtype)
