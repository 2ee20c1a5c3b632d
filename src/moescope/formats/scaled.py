"""Weights of safetensors that go with scales: FP8 and MXFP4, multiplied out or as they are."""

import numpy as np
import torch
from torch import Tensor

from moescope.kernels.blocks import Blocks

FP8_BLOCK, FP4_BLOCK = 128, 32
FP8, MXFP4 = "F8_E4M3", "MXFP4"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply out blocks of 128 x 128 with one scale each (DeepSeek-V3, section 3.3.2)."""
    rows, columns = weight.shape
    scale = _of_rows(scale, rows).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    return (weight.float() * scale).to(dtype)


def dequantize_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply out E2M1, two in a byte, the first in its lower half: `(..., columns)`.

    Each 32 numbers of a row have one scale, a power of two (OCP Microscaling v1.0, MXFP4).

    Args:
        packed: `(..., columns / 2)`, a byte each.
        scale: `(..., columns / 32)`, floating point.
        dtype: of the answer.
    """
    codes = packed.view(torch.uint8)
    codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2).int()
    weight = torch.tensor(E2M1 + tuple(-value for value in E2M1))[codes]
    return (weight * scale.float().repeat_interleave(FP4_BLOCK, dim=-1)).to(dtype)


def exponents(scale: Tensor) -> Tensor:
    """Return scales that are powers of two, as bytes, in floating point."""
    if scale.dtype != torch.uint8:
        return scale
    return scale.view(torch.float8_e8m0fnu).float()


def fp8_blocks(weight: Tensor, scale: Tensor) -> Blocks | None:
    """Return FP8 as the kernels take it: for 128 columns of a row its scale, then the numbers.

    None where one of them is NaN.

    Args:
        weight: `(outputs, columns)` float8_e4m3fn.
        scale: of 128 x 128 numbers each.
    """
    outputs, columns = weight.shape
    codes = weight.view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()) or not scale.float().isfinite().all():
        return None
    groups = scale.shape[1]
    data = np.zeros((outputs, groups, 4 + FP8_BLOCK), np.uint8)
    data[:, :, :4] = _of_rows(scale, outputs).contiguous()[..., None].view(torch.uint8).numpy()
    for group in range(groups):
        part = codes[:, group * FP8_BLOCK : (group + 1) * FP8_BLOCK]
        data[:, group, 4 : 4 + part.shape[1]] = part.numpy()
    return Blocks(FP8, torch.Size((outputs, columns)), data.reshape(outputs, -1))


def mxfp4_blocks(packed: Tensor, scale: Tensor) -> Blocks | None:
    """Return MXFP4 as GGUF lays it out: a scale's byte, then columns 0 to 15 below 16 to 31.

    None where a scale is NaN.

    Args:
        packed: `(outputs, columns / 2)`, as for `dequantize_fp4`.
        scale: `(outputs, columns / 32)`, E8M0 or its bytes.
    """
    outputs, half = packed.shape
    bytes_of_scales = scale.contiguous().view(torch.uint8)
    if bool((bytes_of_scales == 0xFF).any()):
        return None
    codes = packed.contiguous().view(torch.uint8).numpy().reshape(outputs, -1, 2, 8)
    low, high = codes & 15, codes >> 4  # (outputs, groups, halves of 16 columns, 8)
    columns = np.stack([low, high], axis=-1).reshape(outputs, -1, 2, 16)
    data = np.empty((outputs, scale.shape[1], 17), np.uint8)
    data[..., 0] = bytes_of_scales.numpy()
    data[..., 1:] = columns[:, :, 0] | columns[:, :, 1] << 4
    return Blocks(MXFP4, torch.Size((outputs, 2 * half)), data.reshape(outputs, -1))


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """Repeat blocks' scales for each of their rows: `(rows, column blocks)` float32."""
    return scale.float().repeat_interleave(FP8_BLOCK, dim=0)[:rows]
