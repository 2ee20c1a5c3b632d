"""Grouped-query attention whose projections are packed."""

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.kernels import cpu
from moescope.model.attention import GroupedQueryAttention, KVCache
from moescope.model.cache import SlotForm
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.native.linear import parts, wide
from moescope.native.rounded_cache import RoundedCache
from moescope.native.weight_format import cache_type


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
    def slot_form(self) -> SlotForm:
        """What the cache keeps of a token: keys and values of all heads."""
        shape = (self.kv_heads, self.q_proj.out_features // self.heads)
        return SlotForm(shape, shape, cache_type(parts(self.k_proj)[0].format))

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """As PyTorch computes it, with what the kernels keep."""
        kept = None
        if cache is not None:
            kept = RoundedCache(cache, self.slot_form.dtype, returned=torch.float32)
        return super().forward(hidden_states, rotation, positions, kept, recorder)

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
