"""One decoder layer: attention, then a feed-forward part that is dense or a mixture of experts."""

from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.attention import GroupedQueryAttention, KVCache, LatentAttention
from moescope.model.compressed_attention import CompressedAttention
from moescope.model.indexer import Picks
from moescope.model.moe import MLP, MoE
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder


class DecoderLayer(nn.Module):
    """Two residual steps, each behind its own norm."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: LatentAttention | GroupedQueryAttention | CompressedAttention
        if config.compress_rates is not None:
            self.self_attn = CompressedAttention(config, layer_idx)
        elif config.uses_mla:
            self.self_attn = LatentAttention(config, layer_idx)
        else:
            self.self_attn = GroupedQueryAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE
        if config.is_moe_layer(layer_idx):
            self.mlp = MoE(config, layer_idx)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        picks: Picks | None = None,
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape; `picks` go from layer to layer."""
        added = self.attend(hidden_states, rotation, positions, cache, recorder, picks)
        hidden_states = hidden_states + self.scaled(added)
        added = self.feed_forward(hidden_states, input_ids, recorder)
        hidden_states = hidden_states + self.scaled(added)
        if recorder is not None:
            recorder.layer(self.layer_idx, hidden_states)
        return hidden_states

    def attend(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None,
        recorder: Recorder | None,
        picks: Picks | None,
    ) -> Tensor:
        """Norm `(batch, seq, hidden)` and attend."""
        normed = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, LatentAttention):
            return self.self_attn(normed, rotation, positions, cache, recorder, picks)
        return self.self_attn(normed, rotation, positions, cache, recorder)

    def feed_forward(
        self, hidden_states: Tensor, input_ids: Tensor, recorder: Recorder | None
    ) -> Tensor:
        """Norm `(batch, seq, hidden)` and map it by the dense part or the experts."""
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, input_ids, recorder)
        return self.mlp(normed)

    def scaled(self, added: Tensor) -> Tensor:
        """What a half of the layer adds to the residual stream, times the config's multiplier."""
        return added if self.residual_multiplier == 1 else added * self.residual_multiplier
