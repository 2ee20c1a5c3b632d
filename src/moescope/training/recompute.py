"""Activation checkpointing: less is kept for the backward pass, and computed again there."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moescope.model.attention import GroupedQueryAttention, LatentAttention
from moescope.model.compressed_attention import CompressedAttention
from moescope.model.decoder import CausalLM
from moescope.model.moe import MLP, GroupedExperts


def checkpoint_activations(model: CausalLM) -> None:
    """Keep of attention, experts and dense parts their inputs alone.

    Norms and routers are kept, so that whoever watches a pass sees each decision once. So is
    attention with an indexer, which hands its picks on from layer to layer.
    """
    for module in model.modules():
        if isinstance(
            module, (MLP, GroupedExperts, GroupedQueryAttention, CompressedAttention)
        ) or (isinstance(module, LatentAttention) and model.config.index_topk is None):
            _let_recompute(module)


def _let_recompute(module: nn.Module) -> None:
    forward: Callable[..., Any] = module.forward

    @functools.wraps(forward)
    def keep_inputs(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = keep_inputs
