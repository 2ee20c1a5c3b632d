"""Attention over the cache, of both kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.tensors import memory_of, memory_or_none

if TYPE_CHECKING:
    from moescope.kernels._native import (
        AbsorbedAttention,
        GroupedAttention,
        LatentAttention,
        Weights,
    )


def absorbed_attention(up_key: Weights, up_value: Weights, scale: float) -> AbsorbedAttention:
    """Join the halves of `kv_b_proj` for `attend_absorbed`.

    Args:
        up_key: `(heads, kv_lora_rank, qk_nope_head_dim)`.
        up_value: `(heads, v_head_dim, kv_lora_rank)`.
        scale: of the attention logits.
    """
    return extension.native.AbsorbedAttention(up_key, up_value, scale)


def attend_absorbed(
    attention: AbsorbedAttention,
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    v_head_dim: int,
) -> Tensor:
    """Attend in the latent space, one query a sequence (DeepSeek-V2, section 2.1.2).

    Args:
        attention: made by `absorbed_attention`.
        q_nope: `(batch, heads, nope)`.
        q_rope: `(batch, heads, rope)`, rotated.
        latents: `(batch, slots, kv_lora_rank)`, normed, bf16 or float32.
        k_rope: `(batch, slots, rope)`, rotated, of the same type.
        lengths: `(batch,)` int64, slots that each sequence sees.
        v_head_dim: width of a value.

    Returns:
        `(batch, heads, v_head_dim)`.
    """
    out = torch.empty(*q_nope.shape[:2], v_head_dim)
    attention(
        memory_of(q_nope.contiguous()),
        memory_of(q_rope.contiguous()),
        memory_of(latents),
        memory_of(k_rope),
        memory_of(lengths),
        memory_of(out),
    )
    return out


def latent_attention(
    input_norm: tuple[Tensor, float],
    query_down: tuple[Weights, Tensor | None, Tensor] | None,
    query: Weights,
    latent: tuple[Weights, Tensor | None],
    latent_norm: tuple[Tensor, float],
    absorbed: AbsorbedAttention,
    expand: Weights,
    output: tuple[Weights, Tensor | None],
    interleave: bool,
    residual_multiplier: float = 1.0,
) -> LatentAttention:
    """Join a norm and the parts of latent attention: half a layer of `decoder`.

    Args:
        input_norm: weight and epsilon.
        query_down: `q_a_proj`, its bias and the weight of its norm, where there is one.
        query: `q_proj` or `q_b_proj`.
        latent: `kv_a_proj_with_mqa` and its bias.
        latent_norm: weight and epsilon, the latter also of the query's norm.
        absorbed: made by `absorbed_attention`, for new tokens one a sequence.
        expand: `kv_b_proj`, one matrix a head, for prompts.
        output: `o_proj` and its bias.
        interleave: whether rotated pairs are neighbours.
        residual_multiplier: of what is added to the residual stream.
    """
    down, down_bias, down_norm = query_down or (None, None, None)
    return extension.native.latent_attention(
        memory_of(input_norm[0].detach()),
        input_norm[1],
        down,
        memory_or_none(down_bias),
        memory_or_none(down_norm),
        query,
        latent[0],
        memory_or_none(latent[1]),
        memory_of(latent_norm[0].detach()),
        latent_norm[1],
        absorbed,
        expand,
        output[0],
        memory_or_none(output[1]),
        interleave,
        residual_multiplier,
    )


def grouped_attention(
    input_norm: tuple[Tensor, float],
    query: tuple[Weights, Tensor | None],
    key: tuple[Weights, Tensor | None],
    value: tuple[Weights, Tensor | None],
    output: tuple[Weights, Tensor | None],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    rope: int,
    interleave: bool,
    clip: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    residual_multiplier: float = 1.0,
) -> GroupedAttention:
    """Join a norm and the parts of grouped-query attention: half a layer of `decoder`.

    Args:
        input_norm: weight and epsilon.
        query: `q_proj` and its bias.
        key: `k_proj` and its bias.
        value: `v_proj` and its bias.
        output: `o_proj` and its bias.
        heads: of queries, a multiple of `kv_heads`.
        kv_heads: of keys and values.
        scale: factor of the attention logits.
        query_norm: weight of the norm before the rotation, of each head `(width,)` or of all at
            once `(heads * width,)`; its epsilon is the input norm's.
        key_norm: likewise.
        rope: how many numbers of a head are rotated, from its front.
        interleave: whether rotated pairs are neighbours.
        clip: bound on the magnitude of queries, keys and values before the rotation.
        window: slots that a query sees, its own included; None for all.
        sinks: `(heads,)` logits that join the softmax and take no value (gpt-oss).
        residual_multiplier: of what is added to the residual stream.
    """
    return extension.native.grouped_attention(
        memory_of(input_norm[0].detach()),
        input_norm[1],
        query[0],
        memory_or_none(query[1]),
        key[0],
        memory_or_none(key[1]),
        value[0],
        memory_or_none(value[1]),
        output[0],
        memory_or_none(output[1]),
        heads,
        kv_heads,
        scale,
        memory_or_none(query_norm),
        memory_or_none(key_norm),
        rope,
        interleave,
        clip,
        window,
        memory_or_none(sinks),
        residual_multiplier,
    )
