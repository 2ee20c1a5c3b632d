"""What the network computes with. Fast paths equal `reference`, which the tests hold them to."""

from moescope.kernels.activation import Activation
from moescope.kernels.attention import causal_attention
from moescope.kernels.fusion import enable_fusion, fused
from moescope.kernels.grouped import routed_experts, swiglu
from moescope.kernels.grouped_mm import grouped_experts
from moescope.kernels.loss import linear_cross_entropy
from moescope.kernels.norm import rms_norm
from moescope.kernels.visited import visited_experts

__all__ = [
    "Activation",
    "causal_attention",
    "enable_fusion",
    "fused",
    "grouped_experts",
    "linear_cross_entropy",
    "rms_norm",
    "routed_experts",
    "swiglu",
    "visited_experts",
]
