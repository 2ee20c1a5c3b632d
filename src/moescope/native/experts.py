"""Feed-forward parts in one call each: dense, routed, and routed beside shared ones."""

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.kernels import cpu
from moescope.model.moe import MLP, GroupedExperts, MoE
from moescope.model.recorder import Recorder
from moescope.native.linear import Pack, drop_parameters, wide
from moescope.native.reader import WeightReader


class NativeMLP(MLP):
    """A feed-forward block in one call."""

    def __init__(self, mlp: MLP, at: str, read: WeightReader, pack: Pack) -> None:
        with torch.device("meta"):
            super().__init__(
                mlp.gate_proj.in_features, mlp.gate_proj.out_features, mlp.activation.limit
            )
        drop_parameters(self)
        gate, up, down = (
            pack(read.matrix(f"{at}.{name}.weight"))
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.packed = gate, up, down
        self.layer = cpu.feed_forward_layer(None, self.packed, shared_limit=mlp.activation.limit)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(..., hidden)` to `(..., hidden)`."""
        return cpu.feed_forward(self.layer, hidden_states)


class NativeExperts(GroupedExperts):
    """The routed experts in one call."""

    def __init__(
        self,
        config: ModelConfig,
        experts: GroupedExperts,
        at: str,
        read: WeightReader,
        pack: Pack,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        drop_parameters(self)
        gate, up, down = map(pack, read.experts(at, experts.gate_up_proj.shape))
        self.packed = gate, up, down
        self.gate_up_proj_bias = wide(experts.gate_up_proj_bias)
        self.down_proj_bias = wide(experts.down_proj_bias)
        self.layer = self.joined(None)

    def joined(self, shared: NativeMLP | None) -> "cpu.FeedForward":
        """Join these experts and a shared one, if any, into one call."""
        biases = None
        if self.gate_up_proj_bias is not None and self.down_proj_bias is not None:
            gate_bias, up_bias = self.gate_up_proj_bias.chunk(2, dim=1)
            biases = gate_bias, up_bias, self.down_proj_bias
        return cpu.feed_forward_layer(
            self.packed,
            None if shared is None else shared.packed,
            biases=biases,
            act=self.activation.kind,
            limit=self.activation.limit,
            shared_limit=None if shared is None else shared.activation.limit,
        )

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Dispatch `(tokens, hidden)` to the chosen experts and sum what they return, weighted."""
        return cpu.feed_forward(self.layer, hidden_states, topk_ids, topk_weights)


class NativeMoE(MoE):
    """Routed and shared experts in one call, unless a recorder wants to see them apart."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoE,
        at: str,
        read: WeightReader,
        pack: Pack,
        pack_experts: Pack,
    ) -> None:
        nn.Module.__init__(self)
        self.layer_idx = moe.layer_idx
        self.gate = moe.gate.float()
        self.experts = NativeExperts(config, moe.experts, f"{at}.experts", read, pack_experts)
        shared = None
        if moe.shared_experts is not None:
            shared = NativeMLP(moe.shared_experts, f"{at}.shared_experts", read, pack)
        self.shared_experts = shared
        self.layer = self.experts.joined(shared)

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, recorder: Recorder | None = None
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape; `input_ids` is `(batch, seq)`."""
        if recorder is not None and not recorder.wants_routing_alone:
            return super().forward(hidden_states, input_ids, recorder)
        routing = self.gate(hidden_states.flatten(0, 1), input_ids.flatten())
        if recorder is not None:
            recorder.routing(self.layer_idx, routing)
        return cpu.feed_forward(self.layer, hidden_states, routing.topk_ids, routing.topk_weights)
