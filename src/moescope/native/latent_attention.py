"""Multi-head latent attention whose projections are packed."""

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.kernels import cpu
from moescope.model.attention import KVCache, LatentAttention
from moescope.model.cache import SlotForm
from moescope.model.indexer import Picks
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.native.linear import Pack, PackedLinear, parts
from moescope.native.reader import WeightReader
from moescope.native.rounded_cache import RoundedCache
from moescope.native.weight_format import cache_type


class NativeLatentAttention(LatentAttention):
    """Latent attention whose projections are packed; new tokens attend absorbed."""

    def __init__(
        self,
        config: ModelConfig,
        attention: LatentAttention,
        at: str,
        read: WeightReader,
        pack: Pack,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, attention.layer_idx)
        for name, child in attention.named_children():
            setattr(self, name, child)
        expand, up_key, up_value = read.latent(at, self.heads, self.nope)
        self.kv_b_proj = PackedLinear(expand, attention.kv_b_proj.bias, pack)
        self.absorbed = cpu.absorbed_attention(pack(up_key), pack(up_value), self.scale)

    @property
    def slot_form(self) -> SlotForm:
        """What the cache keeps of a token: its latent and its rotated key."""
        dtype = cache_type(parts(self.kv_a_proj_with_mqa)[0].format)
        return SlotForm((self.kv_lora_rank,), (self.rope,), dtype)

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        picks: Picks | None = None,
    ) -> Tensor:
        """As PyTorch computes it, with what the kernels keep."""
        dtype = self.slot_form.dtype
        kept = None if cache is None else RoundedCache(cache, dtype, returned=dtype)
        return super().forward(hidden_states, rotation, positions, kept, recorder, picks)

    def block(self, input_norm: RMSNorm, residual_multiplier: float) -> "cpu.Attention":
        """Join the norm before it and all its parts into half a layer of a native decoder."""
        query_down, query = None, "q_proj"
        if not hasattr(self, "q_proj"):
            query_down, query = (*parts(self.q_a_proj), self.q_a_layernorm.weight), "q_b_proj"
        return cpu.latent_attention(
            (input_norm.weight, input_norm.eps),
            query_down,
            parts(getattr(self, query))[0],
            parts(self.kv_a_proj_with_mqa),
            (self.kv_a_layernorm.weight, self.kv_a_layernorm.eps),
            self.absorbed,
            parts(self.kv_b_proj)[0],
            parts(self.o_proj),
            self.interleave,
            residual_multiplier,
        )

    def attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend in the latent space, one query a row: `(batch, 1, heads, v_head_dim)`."""
        lengths = mask[:, 0, 0].sum(dim=-1)  # (batch,)
        output = cpu.attend_absorbed(
            self.absorbed, q_nope[:, 0], q_rope[:, 0], latents, k_rope, lengths, self.v_head_dim
        )
        return output[:, None]
