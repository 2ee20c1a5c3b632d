"""The mixture of experts: route -> dispatch -> experts -> combine, plus the shared experts."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moescope import kernels
from moescope.config import ModelConfig
from moescope.model.recorder import Recorder
from moescope.model.routing import ROUTERS, Router, TokenTable


class MLP(nn.Module):
    """A SwiGLU feed-forward block: `down(silu(gate(x)) * up(x))` (Shazeer 2020, eq. 6).

    Args:
        hidden_size: of what comes and goes.
        intermediate_size: of what meets the activation.
        swiglu_limit: bounds `gate(x)` from above and `up(x)` from both sides.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, swiglu_limit: float | None = None
    ) -> None:
        super().__init__()
        self.activation = kernels.Activation("silu", swiglu_limit)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(..., hidden)` to `(..., hidden)`."""
        return self.down_proj(
            self.activation(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        )


class Dispatcher(Protocol):
    """Brings tokens to where their experts are, where these do not all lie here."""

    def held(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that belongs to the experts here."""
        ...

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """Send tokens out; return those that came, with ids and weights of the experts here."""
        ...

    def combine(self, outputs: Tensor, arrived: Any) -> Tensor:
        """Send outputs back to the tokens, and sum each token's."""
        ...


class GroupedExperts(nn.Module):
    """The weights of all routed experts of a layer, stacked.

    Attributes:
        dispatcher: None where all experts lie here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.required("n_routed_experts")
        intermediate = config.required("moe_intermediate_size")
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.activation = kernels.Activation(config.expert_act, config.swiglu_limit)
        self.dispatcher: Dispatcher | None = None
        self.gate_up_proj_bias: nn.Parameter | None = None
        self.down_proj_bias: nn.Parameter | None = None
        if config.expert_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * intermediate))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Dispatch `(tokens, hidden)` to the chosen experts and sum what they return, weighted."""
        if self.dispatcher is None:
            return self.compute(hidden_states, topk_ids, topk_weights)
        there = self.dispatcher.dispatch(hidden_states, topk_ids, topk_weights)
        outputs = self.compute(there.hidden_states, there.topk_ids, there.topk_weights)
        return self.dispatcher.combine(outputs, there)

    def compute(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum what the experts here return: `(tokens, hidden)` to the same shape."""
        gate_up_proj, down_proj = self._held(self.gate_up_proj), self._held(self.down_proj)
        on_cpu = hidden_states.device.type == "cpu"
        if on_cpu and self.gate_up_proj_bias is None and self.activation.is_plain:
            return kernels.routed_experts(
                hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights
            )
        experts = kernels.visited_experts if on_cpu else kernels.grouped_experts
        return experts(
            hidden_states,
            gate_up_proj,
            down_proj,
            topk_ids,
            topk_weights,
            activation=self.activation,
            gate_up_proj_bias=self._held(self.gate_up_proj_bias),
            down_proj_bias=self._held(self.down_proj_bias),
        )

    def _held(self, parameter: Any) -> Any:
        if self.dispatcher is None or parameter is None:
            return parameter
        return self.dispatcher.held(parameter)


class MoE(nn.Module):
    """Routed experts chosen per token, and shared experts that see every token."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        by_table = layer_idx < config.num_hash_layers
        self.gate: Router = TokenTable(config) if by_table else ROUTERS[config.topk_method](config)
        self.experts = GroupedExperts(config)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.required("moe_intermediate_size")
            self.shared_experts = MLP(config.hidden_size, width, config.swiglu_limit)

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, recorder: Recorder | None = None
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape; `input_ids` is `(batch, seq)`."""
        tokens = hidden_states.flatten(0, 1)  # (tokens, hidden)
        routing = self.gate(tokens, input_ids.flatten())
        output = self.experts(tokens, routing.topk_ids, routing.topk_weights)
        shared_output = None if self.shared_experts is None else self.shared_experts(tokens)
        if recorder is not None:
            recorder.routing(self.layer_idx, routing)
            recorder.experts(self.layer_idx, output, shared_output)
        if shared_output is not None:
            output = output + shared_output
        return output.view_as(hidden_states)
