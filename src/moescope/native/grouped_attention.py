"""Grouped-query attention whose projections are packed."""

import torch

from moescope.config import ModelConfig
from moescope.kernels import cpu
from moescope.model.attention import GroupedQueryAttention
from moescope.model.norm import RMSNorm
from moescope.native.linear import parts, wide


class NativeGroupedAttention(GroupedQueryAttention):
    """Grouped-query attention whose projections are packed."""

    def __init__(self, config: ModelConfig, attention: GroupedQueryAttention) -> None:
        with torch.device("meta"):
            super().__init__(config, attention.layer_idx)
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.sinks = wide(attention.sinks)
        self.rope = config.rotary_dim

    @property
    def slot_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the cache keeps of a token: keys and values of all heads."""
        shape = (self.kv_heads, self.q_proj.out_features // self.heads)
        return shape, shape

    def block(self, input_norm: RMSNorm, residual_multiplier: float) -> "cpu.Attention":
        """Join the norm before it and all its parts into half a layer of a native decoder."""
        return cpu.grouped_attention(
            (input_norm.weight, input_norm.eps),
            parts(self.q_proj),
            parts(self.k_proj),
            parts(self.v_proj),
            parts(self.o_proj),
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            query_norm=None if self.q_norm is None else self.q_norm.weight,
            key_norm=None if self.k_norm is None else self.k_norm.weight,
            rope=self.rope,
            interleave=self.interleave,
            clip=self.clip,
            window=self.window,
            sinks=self.sinks,
            residual_multiplier=residual_multiplier,
        )
