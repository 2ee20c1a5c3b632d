"""Bytes of weights that products read for a token: what generating costs where memory is the limit.

Norms, the router's matrix and the one row of the embedding are not counted; they are small beside
the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moescope.model.decoder import CausalLM
from moescope.model.moe import GroupedExperts, MoE
from moescope.model.routing import UNUSED, Routing
from moescope.native.experts import NativeExperts, NativeMLP
from moescope.native.latent_attention import NativeLatentAttention
from moescope.native.linear import PackedLinear


@dataclass(frozen=True)
class WeightBytes:
    """What reading a token by itself takes.

    Attributes:
        always: bytes whoever the token visits: attention, dense and shared parts, output head.
        expert: bytes of one routed expert, by layer.
    """

    always: int
    expert: dict[int, int]

    @classmethod
    def of(cls, model: CausalLM) -> "WeightBytes":
        """Measure a network, packed for the native kernels or not."""
        expert = {
            layer_idx: _expert_bytes(layer.mlp.experts)
            for layer_idx, layer in enumerate(model.model.layers)
            if isinstance(layer.mlp, MoE)
        }
        return cls(_always(model.model.layers) + _always(model.lm_head), expert)

    def read(self, routings: dict[int, Routing], tokens: int) -> Tensor:
        """Return the bytes of each token, `(tokens,)` int64, by what the routers decided."""
        read = torch.full((tokens,), self.always)
        for layer_idx, routing in routings.items():
            chosen = (routing.topk_ids != UNUSED).sum(dim=-1).cpu()  # (tokens,)
            read += chosen * self.expert[layer_idx]
        return read


def _always(module: nn.Module) -> int:
    """Sum the matrices below a module that every token meets."""
    if isinstance(module, GroupedExperts):
        return 0
    if isinstance(module, NativeMLP):
        return sum(weights.matrix_bytes for weights in module.packed)
    if isinstance(module, PackedLinear):
        return module.packed.matrix_bytes
    if isinstance(module, nn.Linear):
        return module.weight.nbytes
    if isinstance(module, NativeLatentAttention):
        # A token by itself reads `kv_b_proj` in the two halves that are absorbed.
        parts = (child for name, child in module.named_children() if name != "kv_b_proj")
        return module.absorbed.weight_bytes + sum(_always(part) for part in parts)
    return sum(_always(child) for child in module.children())


def _expert_bytes(experts: GroupedExperts) -> int:
    if isinstance(experts, NativeExperts):
        return sum(weights.matrix_bytes for weights in experts.packed)
    n_routed_experts = experts.down_proj.shape[0]
    return sum(weight.nbytes for weight in experts.parameters()) // n_routed_experts
