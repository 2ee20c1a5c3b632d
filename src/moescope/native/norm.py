"""The norm on the native kernels."""

from torch import Tensor, nn

from moescope.kernels import cpu
from moescope.model.norm import RMSNorm


class NativeRMSNorm(RMSNorm):
    """The norm in one call."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm.weight.numel(), norm.eps)
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension, in float32."""
        return cpu.rms_norm(hidden_states, self.weight, self.eps)
