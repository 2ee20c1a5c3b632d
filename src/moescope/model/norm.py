"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from moescope import kernels


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension; the type is kept."""
        return kernels.rms_norm(hidden_states, self.weight, self.eps)
