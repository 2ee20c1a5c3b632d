"""Weight formats smaller than bf16."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32
"""Columns that share a scale and a minimum in int4."""
INT4_MINIMUM = 8
"""What a minimum's byte counts, in what a scale's counts."""
INT4_STEPS = (-1.5, -1, -0.5, 0, 0.5, 1, 2)
"""Levels more than 15 over which a group's range is tried to be spread."""


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


@dataclass(frozen=True)
class Int4:
    """Weights as `unit * (scale * level - 8 * minimum)`, in groups of 32 columns.

    Attributes:
        levels: `(..., groups, 32)`, from 0 to 15; columns are padded with zeros.
        scale: `(..., groups, 1)`, from 0 to 255.
        minimum: `(..., groups, 1)`, from 0 to 255.
        unit: `(..., 1, 1)` float32, one a row.
    """

    levels: Tensor
    scale: Tensor
    minimum: Tensor
    unit: Tensor

    def dequantized(self, columns: int) -> Tensor:
        """Return `(..., columns)` float32."""
        whole = self.scale * self.levels - INT4_MINIMUM * self.minimum
        return (whole * self.unit).flatten(-2)[..., :columns]


def quantize_int4(weight: Tensor, importance: Tensor | None = None) -> Int4:
    """Round `(..., columns)` to 16 levels with a scale and a minimum for 32 columns.

    A group's range is tried to be spread over some levels more and less than there are, and scale
    and minimum are fitted to the levels that result (least squares, twice); the line that errs
    least is kept. Scales and minima are rounded to bytes that count in one number of the row, and
    the minimum is fitted once more to the scale that came of it.

    Args:
        weight: of any floating type.
        importance: how much an error in each column counts, `(columns,)`, beside what counts in any
            case: the weight's magnitude plus the root mean square of its row.
    """
    padding = -weight.shape[-1] % INT4_GROUP
    row = F.pad(weight.float(), (0, padding))
    counts = row.abs() + row.square().mean(dim=-1, keepdim=True).sqrt()
    if importance is not None:
        counts = counts * F.pad(importance.float(), (0, padding), value=1)
    groups = row.unflatten(-1, (-1, INT4_GROUP))  # (..., groups, 32)
    counts = counts.unflatten(-1, (-1, INT4_GROUP))
    scale, minimum = _fitted_lines(groups, counts)
    largest = torch.maximum(scale, -minimum / INT4_MINIMUM).amax(dim=-2, keepdim=True)
    unit = largest / 255
    step = unit * INT4_MINIMUM
    scale = torch.nan_to_num(scale / unit).round().clamp(0, 255)
    minimum = torch.nan_to_num(-minimum / step).round().clamp(0, 255)

    def levels() -> Tensor:
        quotient = (groups + minimum * step) / (unit * scale)
        return torch.nan_to_num(quotient).round().clamp(0, 15)

    missed = (counts * (levels() * (unit * scale) - groups)).sum(dim=-1, keepdim=True)
    mean = torch.nan_to_num(missed / counts.sum(dim=-1, keepdim=True))
    minimum = torch.nan_to_num(mean / step).round().clamp(0, 255)
    return Int4(levels(), scale, minimum, unit)


def _fitted_lines(groups: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima, at most 0, of `scale * level + minimum`: `(..., groups, 1)`."""

    def total(values: Tensor) -> Tensor:
        return values.sum(dim=-1, keepdim=True)

    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    width = groups.amax(dim=-1, keepdim=True) - low
    weight, mean = total(counts), total(counts * groups)
    best_scale, best_minimum = width / 15, low
    least = torch.full_like(low, torch.inf)
    for more in INT4_STEPS:
        scale, minimum = width / (15 + more), low
        for _ in range(2):
            level = torch.nan_to_num((groups - minimum) / scale).round().clamp(0, 15)
            counted = counts * level
            once, twice = total(counted), total(counted * level)
            product = total(counted * groups)
            determinant = weight * twice - once * once
            fits = determinant > 1e-6 * weight * twice
            scale = torch.where(fits, (weight * product - mean * once) / determinant, scale)
            minimum = torch.where(fits, (twice * mean - once * product) / determinant, minimum)
            above = minimum > 0
            scale = torch.where(above, product / twice, scale)
            minimum = torch.where(above, 0, minimum)
            error = total(counts * (level * scale + minimum - groups).square())
            better = error < least
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
            least = torch.where(better, error, least)
    return best_scale, best_minimum


def rounded(weight: Tensor, weight_format: str, importance: Tensor | None = None) -> Tensor:
    """`weight` `(..., columns)` as `int8`, `int4` or `bf16` would hold it, in its own type.

    Args:
        weight: what to round.
        weight_format: the format.
        importance: as for `quantize_int4`.
    """
    if weight_format == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    if weight_format == "int8":
        return dequantize_int8(*quantize_int8(weight), weight.dtype)
    return quantize_int4(weight, importance).dequantized(weight.shape[-1]).to(weight.dtype)
