"""What the network computes with. Fast paths equal `reference`, which the tests hold them to."""

from moescope.kernels.attention import causal_attention
from moescope.kernels.grouped import routed_experts, swiglu
from moescope.kernels.loss import linear_cross_entropy

__all__ = ["causal_attention", "linear_cross_entropy", "routed_experts", "swiglu"]
