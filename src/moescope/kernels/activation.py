"""What gate and up do to each other inside an expert."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moescope.kernels.grouped import swiglu

SWIGLUOAI_ALPHA = 1.702
"""Sigmoid gain of gpt-oss's activation."""


@dataclass(frozen=True)
class Activation:
    """`silu(gate) * up`, or gpt-oss's `gate * sigmoid(1.702 * gate) * (up + 1)`.

    Attributes:
        kind: which of the two.
        limit: bounds `gate` from above and `up` from both sides first (gpt-oss, DeepSeek-V4).
    """

    kind: Literal["silu", "swigluoai"] = "silu"
    limit: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is `silu(gate) * up` and nothing else."""
        return self.kind == "silu" and self.limit is None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Join two tensors of one shape."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.kind == "silu":
            return swiglu(gate, up)
        return gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate) * (up + 1)
