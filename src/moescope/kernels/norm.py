"""Root-mean-square normalisation."""

import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.fusion import fused


@fused
def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32."""
    normalised = F.rms_norm(hidden_states.float(), (hidden_states.shape[-1],), eps=eps)
    return weight * normalised.to(hidden_states.dtype)
