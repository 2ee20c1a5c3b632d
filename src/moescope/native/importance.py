"""How much an error in each column of a weight counts: as what the column is multiplied with.

Nothing has to be given for it: the network reads a few hundred tokens drawn at random, layer by
layer, and the mean squares of what its matrices are multiplied with are what their columns' errors
are counted by (the diagonal of what Frantar et al. 2023, "GPTQ", eq. 2, take whole). Random tokens
serve as well as text does; docs/decisions/006-quantization.md has the figures.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.model.decoder import CausalLM
from moescope.model.moe import GroupedExperts

TOKENS = 512
"""That the network reads."""
PRIOR = 16
"""Tokens of a layer's average that each expert has seen, beside its own: some are given few."""

Importance = Mapping[str, Tensor]
"""Of weights by name: `(columns,)`, of experts' `(experts, columns)`."""


@torch.no_grad()
def weigh_layers(
    model: CausalLM,
    table: Tensor,
    tensor: Callable[[str], Tensor],
    take: Callable[[int, Importance], None],
) -> Tensor:
    """Have a network read random tokens, with one layer's weights in memory at a time.

    Args:
        model: a network of which everything is loaded but what is packed, which is on the meta
            device.
        table: its embedding.
        tensor: returns a weight by its name.
        take: called with each layer's number and what is found of its weights, once the layer has
            been computed; it replaces the layer's modules, or lets go of their weights.

    Returns:
        What is found of the head, `(hidden,)`; ones where it is not finite.
    """
    config, dtype = model.config, model.model.norm.weight.dtype
    found: dict[str, Tensor] = {}
    hooks: list[Any] = []

    def bring(prefix: str, layer: nn.Module, _: Any) -> None:
        for name, parameter in list(layer.named_parameters()):
            if parameter.is_meta:
                _put(layer, name, tensor(f"{prefix}.{name}").to(dtype))
        for name, module in layer.named_modules():
            at = f"{prefix}.{name}"
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(partial(_note_linear, found, at)))
            elif isinstance(module, GroupedExperts):
                hooks.append(module.register_forward_pre_hook(partial(_note_experts, found, at)))

    def done(layer_idx: int, _layer: nn.Module, _input: Any, _output: Any) -> None:
        while hooks:
            hooks.pop().remove()
        take(layer_idx, {name: one for name, one in found.items() if bool(one.isfinite().all())})
        found.clear()

    watched = [
        handle
        for layer_idx, layer in enumerate(model.model.layers)
        for handle in (
            layer.register_forward_pre_hook(partial(bring, f"model.layers.{layer_idx}")),
            layer.register_forward_hook(partial(done, layer_idx)),
        )
    ]
    shape = 1, min(TOKENS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    before = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    try:
        states = model.model.norm(model.model(ids))
    finally:
        model.model.embed_tokens.weight = before
        for handle in [*watched, *hooks]:
            handle.remove()
    of_head = states.flatten(0, -2).float().square().mean(dim=0)
    return of_head if bool(of_head.isfinite().all()) else torch.ones_like(of_head)


def _put(module: nn.Module, name: str, weight: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Parameter(weight, requires_grad=False))


def _note_linear(found: dict[str, Tensor], at: str, _: nn.Module, given: tuple[Tensor]) -> None:
    inputs = given[0].flatten(0, -2).float()  # (tokens, columns)
    found[f"{at}.weight"] = inputs.square().mean(dim=0)


def _note_experts(
    found: dict[str, Tensor], at: str, experts: nn.Module, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert isinstance(experts, GroupedExperts)
    tokens, topk_ids, _ = given  # (tokens, hidden), (tokens, slots): -1 in an unused one
    count, _, intermediate = experts.down_proj.shape
    visits = F.one_hot(topk_ids + 1, count + 1)[..., 1:].sum(dim=1).bool()  # (tokens, experts)
    outer = visits.float().T @ tokens.float().square()  # (experts, hidden)
    inner = outer.new_zeros(count, intermediate)  # (experts, intermediate)
    biases = experts.gate_up_proj_bias
    for expert in range(count):
        visitors = tokens[visits[:, expert]]
        bias = None if biases is None else biases[expert].to(visitors.dtype)
        gate, up = F.linear(visitors, experts.gate_up_proj[expert], bias).chunk(2, dim=-1)
        inner[expert] = experts.activation(gate, up).float().square().sum(dim=0)
    seen = visits.sum(dim=0)[:, None]  # (experts, 1)
    for names, sums in (("gate_proj", "up_proj"), outer), (("down_proj",), inner):
        average = sums.sum(dim=0) / seen.sum().clamp(min=1)
        means = (sums + PRIOR * average) / (seen + PRIOR)
        found.update({f"{at}.{name}": means for name in names})
