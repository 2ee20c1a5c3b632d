"""The embedding of a network on the native kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideEmbedding(nn.Embedding):
    """An embedding in a narrow type whose rows are handed out in float32."""

    def __init__(self, weight: nn.Parameter) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, _weight=weight)
        narrow = weight.dtype in (torch.float32, torch.bfloat16)
        self.weight = weight if narrow else nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ids to `(..., hidden)` float32."""
        return F.embedding(input, self.weight).float()
