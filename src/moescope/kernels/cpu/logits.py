"""What is asked of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.tensors import as_rows, memory_of


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of `(rows, vocab)`, in order, of equal ones the first.

    Returns their ids, int64, and their logits, both `(rows, count)`.
    """
    rows = as_rows(logits)
    ids, values = torch.empty(len(rows), count, dtype=torch.int64), torch.empty(len(rows), count)
    extension.native.likeliest(memory_of(rows), memory_of(ids), memory_of(values))
    return ids, values


def log_sums(logits: Tensor, scale: float = 1.0) -> Tensor:
    """`log(sum(exp(scale * logits)))` of each row of `(rows, vocab)`: `(rows,)`."""
    rows = as_rows(logits)
    out = torch.empty(len(rows))
    extension.native.log_sums(memory_of(rows), scale, memory_of(out))
    return out
