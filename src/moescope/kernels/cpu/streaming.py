"""Experts that stay in their file until a token visits them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moescope.kernels.cpu import extension

if TYPE_CHECKING:
    from moescope.kernels._native import Weights


def stream_weights(
    descriptor: int, offset: int, size: int, weight_format: str, shape: tuple[int, int, int]
) -> Weights:
    """Take experts from an open file, each of which stays there until a token visits it.

    Args:
        descriptor: of the file, which may be closed afterwards.
        offset: where they begin.
        size: bytes.
        weight_format: `int8`, `int4` or `bf16`.
        shape: `(experts, outputs, columns)`.

    Raises:
        ValueError: weights of this shape have another size.
        RuntimeError: the file ends too early or cannot be read.
    """
    return extension.native.stream_weights(descriptor, offset, size, weight_format, *shape)


@dataclass(frozen=True)
class ExpertCounts:
    """What became of streamed experts since the process began.

    Attributes:
        visits: experts that a layer asked for, once for all tokens that came together.
        hits: of them, those that were in memory.
        bytes_read: from files.
        held: bytes that are in memory now.
        limit: bytes that may be.
    """

    visits: int
    hits: int
    bytes_read: int
    held: int
    limit: int


def limit_experts(limit: int) -> None:
    """Keep so many bytes of streamed experts in memory; those longest unused go first."""
    extension.native.limit_experts(limit)


def expert_counts() -> ExpertCounts:
    """Return the counts of streamed experts; all zero where none are."""
    return ExpertCounts(*extension.native.expert_counts())
