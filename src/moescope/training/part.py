"""Rows of a step that are computed together, and the share of them that a rank computes."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from moescope.training.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a step that are computed together, by one rank or by all.

    Attributes:
        ids: `(rows, seq + 1)`; each token but the first is predicted.
        share: by which the loss of all its rows is multiplied, so that those of a step add up.
        read: `(rows, seq)` bool, which tokens count for the experts' load; None where all do.
        loss_share: by which the loss of these rows is multiplied, so that those of all ranks add
            up to that of all rows.
        row_share: these rows over all rows; zero if they stand here so that a rank without any
            computes something, and count for nothing.
    """

    ids: Tensor
    share: float
    read: Tensor | None = None
    loss_share: float = 1.0
    row_share: float = 1.0

    def own(self, ranks: Ranks) -> Self:
        """Return the rows that this rank computes; one that counts for nothing if there is none."""
        if ranks.size == 1:
            return self
        rows = ranks.own(len(self.ids))
        if rows.start == rows.stop:
            return self.filler()
        row_share = (rows.stop - rows.start) / len(self.ids)
        loss_share = self.loss_share_of(rows)
        return replace(self.cut(rows), row_share=row_share, loss_share=loss_share)

    def cut(self, rows: slice) -> Self:
        """Return some rows with all that belongs to them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: v[rows] for n, v in values.items() if isinstance(v, Tensor)})

    def loss_share_of(self, rows: slice) -> float:
        """Return by what the loss of some rows is multiplied; here it is a mean over rows."""
        return (rows.stop - rows.start) / len(self.ids)

    def filler(self) -> Self:
        """Return a row that counts for nothing."""
        first = self.cut(slice(0, 1))
        read = torch.zeros_like(first.ids[:, 1:], dtype=torch.bool)
        return replace(first, read=read, loss_share=0.0, row_share=0.0)

    @property
    def rows(self) -> int:
        """Rows that count."""
        return len(self.ids) if self.row_share else 0

    @property
    def tokens(self) -> int:
        """Tokens that count for the experts' load."""
        return self.ids[:, 1:].numel() if self.read is None else int(self.read.sum())
