"""What is asked of logits."""

from __future__ import annotations

from collections.abc import Sequence

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


def shortlist(
    logits: Tensor, count: int, scales: Sequence[float]
) -> tuple[list[list[int]], list[list[float]], list[float], list[float]]:
    """What choosing a token of each row of `(rows, vocab)` takes, as lists.

    Returns the ids and logits of `likeliest`, then `log_sums` of the logits and of those times
    each row's scale.
    """
    return extension.native.shortlist(memory_of(as_rows(logits)), count, scales)
