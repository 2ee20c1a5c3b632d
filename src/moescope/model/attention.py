"""Attention: multi-head latent (DeepSeek-V2/V3) and grouped-query (Llama, Qwen, DeepSeekMoE)."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope import kernels
from moescope.config import ModelConfig
from moescope.model.indexer import Indexer, Picks, picked_mask
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.model.rope import rotate, softmax_scale

LATENT_NORM_EPS = 1e-6
"""DeepSeek's latent norms use this constant, not `rms_norm_eps`."""


class KVCache(Protocol):
    """What attention needs of a cache; a token's slot is its position."""

    def update(
        self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store `(batch, seq, ...)` at `positions` `(batch, seq)`; return all slots used so far."""
        ...

    def store(
        self, layer_idx: int, name: str, states: Tensor, places: Tensor, tokens_per_slot: int = 1
    ) -> Tensor:
        """Store further states of the same tokens; return all slots used so far."""
        ...


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, eq. 9-19).

    Keys and values are expanded from one latent vector a token; the cache holds only that
    latent and the rotated key shared by all heads. With an indexer, or one of an earlier layer, a
    query sees what that has picked.
    """

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = heads = config.num_attention_heads
        self.kv_lora_rank = config.required("kv_lora_rank")
        self.nope = config.required("qk_nope_head_dim")
        self.rope = config.required("qk_rope_head_dim")
        self.v_head_dim = config.required("v_head_dim")
        self.interleave = config.rope_interleave
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, heads * (self.nope + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=bias)
        self.sparse = config.index_topk is not None
        self.indexer = Indexer(config) if config.has_indexer(layer_idx) else None

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        picks: Picks | None = None,
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape; `picks` are an earlier layer's."""
        query_inputs = self.query_inputs(hidden_states)
        q_nope, q_rope = self.queries(query_inputs, rotation)
        latents, k_rope = self.latents(hidden_states, rotation)
        mask = None
        if cache is not None:
            latents, k_rope = cache.update(self.layer_idx, latents, k_rope, positions)
            mask = visible(positions, latents.shape[1])
        picked = None
        if self.sparse:
            picks = Picks() if picks is None else picks
            if self.indexer is not None:
                picks.slots = self.pick(
                    self.indexer, hidden_states, query_inputs, rotation, positions, cache
                )
            picked = picks.slots
            seen = visible(positions, latents.shape[1])
            if picked is not None:
                mask = seen = seen & picked_mask(picked, latents.shape[1])[:, None]
            if recorder is not None:
                recorder.picks(self.layer_idx, seen[:, 0], 1)
        shown = recorder is not None and recorder.wants_attention
        if mask is not None and cache is not None and hidden_states.shape[1] == 1 and not shown:
            if picked is not None:  # only these are read
                rows = torch.arange(len(picked), device=picked.device)[:, None]
                latents, k_rope = latents[rows, picked[:, 0]], k_rope[rows, picked[:, 0]]
                mask = mask.gather(-1, picked[:, None])
            output = self.attend_absorbed(q_nope, q_rope, latents, k_rope, mask)
            return self.o_proj(output.flatten(2))
        query = torch.cat([q_nope, q_rope], dim=-1)  # (batch, seq, heads, nope + rope)
        expanded = self.kv_b_proj(latents).unflatten(-1, (self.heads, -1))
        k_nope, value = expanded.split([self.nope, self.v_head_dim], dim=-1)
        k_shared = k_rope[:, :, None].expand(-1, -1, self.heads, -1)
        key = torch.cat([k_nope, k_shared], dim=-1)  # (batch, slots, heads, nope + rope)
        output = attend(query, key, value, self.scale, mask, self.layer_idx, recorder)
        return self.o_proj(output.flatten(2))

    def query_inputs(self, hidden_states: Tensor) -> Tensor:
        """Return what queries are mapped from: latents `(batch, seq, q_lora_rank)`, if any."""
        if hasattr(self, "q_proj"):
            return hidden_states
        return self.q_a_layernorm(self.q_a_proj(hidden_states))

    def queries(
        self, query_inputs: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the unrotated and the rotated part, `(batch, seq, heads, nope | rope)`."""
        query = getattr(self, "q_proj" if hasattr(self, "q_proj") else "q_b_proj")(query_inputs)
        q_nope, q_rope = query.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], -1)
        return q_nope, rotate(q_rope, *rotation, interleave=self.interleave)

    def latents(
        self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what the cache keeps: `(batch, seq, kv_lora_rank)` and `(batch, seq, rope)`."""
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latents, k_rope = compressed.split([self.kv_lora_rank, self.rope], dim=-1)
        k_rope = rotate(k_rope[:, :, None], *rotation, interleave=self.interleave)[:, :, 0]
        return self.kv_a_layernorm(latents), k_rope

    def pick(
        self,
        indexer: Indexer,
        hidden_states: Tensor,
        query_latents: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None,
    ) -> Tensor | None:
        """Return the slots that each query sees, `(batch, seq, index_topk)`; None for all."""
        keys = indexer.keys(hidden_states, rotation)  # (batch, seq, index_head_dim)
        if cache is not None:
            keys = cache.store(self.layer_idx, "index_keys", keys, positions)
        seen = visible(positions, keys.shape[1])[:, 0]
        return indexer.pick(hidden_states, query_latents, rotation, keys, seen)

    def attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend in the latent space: `kv_b_proj` moves to the query and the output side.

        Keys and values of past tokens are never expanded (DeepSeek-V2, section 2.1.2).
        Returns `(batch, seq, heads, v_head_dim)`.
        """
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # (heads, nope + v, rank)
        up_key, up_value = weight.split([self.nope, self.v_head_dim], dim=1)
        q_latent = torch.einsum("bshn,hnr->bhsr", q_nope, up_key)
        logits = q_latent @ latents[:, None].mT + q_rope.transpose(1, 2) @ k_rope[:, None].mT
        logits = logits.float() * self.scale  # (batch, heads, seq, slots)
        probabilities = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        mixed = probabilities.to(latents.dtype) @ latents[:, None]  # (batch, heads, seq, rank)
        return torch.einsum("bhsr,hvr->bshv", mixed, up_value)


class GroupedQueryAttention(nn.Module):
    """Several query heads share a key and a value head (Ainslie et al. 2023).

    By the config, queries and keys are normed and bounded before they are rotated, a query sees
    the last slots of a window alone, and a learned sink takes a share of its attention.
    """

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.interleave = config.rope_interleave
        self.scale = softmax_scale(config)
        self.window, self.clip = config.window_of(layer_idx), config.clip_qkv
        hidden, width, bias = config.hidden_size, config.qk_head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        o_bias = bias if config.attention_out_bias is None else config.attention_out_bias
        self.o_proj = nn.Linear(self.heads * width, hidden, bias=o_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            at_once = (1, 1) if config.qk_norm == "head" else (self.heads, self.kv_heads)
            self.q_norm, self.k_norm = (
                RMSNorm(heads * width, config.rms_norm_eps) for heads in at_once
            )
        self.norms_heads = config.qk_norm == "head"
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(self.heads))

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape."""
        query = self.normed(self.q_proj(hidden_states), self.heads, self.q_norm)
        key = self.normed(self.k_proj(hidden_states), self.kv_heads, self.k_norm)
        value = self.normed(self.v_proj(hidden_states), self.kv_heads, None)
        query = rotate(query, *rotation, interleave=self.interleave)
        key = rotate(key, *rotation, interleave=self.interleave)
        mask = None
        if cache is not None:
            key, value = cache.update(self.layer_idx, key, value, positions)
            mask = visible(positions, key.shape[1], self.window)
        elif self.window is not None and self.window < key.shape[1]:
            mask = visible(positions, key.shape[1], self.window)
        output = attend(query, key, value, self.scale, mask, self.layer_idx, recorder, self.sinks)
        return self.o_proj(output.flatten(2))

    def normed(self, states: Tensor, heads: int, norm: RMSNorm | None) -> Tensor:
        """Cut `(batch, seq, heads * width)` into heads, normed and bounded as the config says."""
        if norm is not None and not self.norms_heads:
            states = norm(states)
        states = states.unflatten(-1, (heads, -1))  # (batch, seq, heads, width)
        if norm is not None and self.norms_heads:
            states = norm(states)
        return states if self.clip is None else states.clamp(-self.clip, self.clip)


def visible(positions: Tensor, slots: int, window: int | None = None) -> Tensor:
    """Which cache slots each query may see: `(batch, 1, seq, slots)` bool.

    Args:
        positions: `(batch, seq)` of the queries.
        slots: in the cache.
        window: how many slots a query sees, its own included; None for all.
    """
    slot, position = torch.arange(slots, device=positions.device), positions[:, None, :, None]
    seen = slot <= position
    return seen if window is None else seen & (slot > position - window)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    layer_idx: int,
    recorder: Recorder | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention over `(batch, seq, heads, width)`; causal where `mask` is None.

    Key and value may have fewer heads than the query. `sinks` `(heads,)` join the softmax and
    take no value (Xiao et al. 2023; learned in gpt-oss). Returns `(batch, seq, heads, v width)`.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    shown = recorder is not None and recorder.wants_attention
    if shown or sinks is not None:
        probabilities = _probabilities(query, key, scale, mask, sinks)
        if recorder is not None and shown:
            recorder.attention(layer_idx, probabilities)
        if recorder is not None and sinks is not None:
            recorder.sinks(layer_idx, 1 - probabilities.sum(dim=-1))
        if sinks is not None:
            output = probabilities.to(value.dtype) @ _repeat_heads(value, query)
            return output.transpose(1, 2)
    if mask is None and query.requires_grad:
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        return kernels.causal_attention(query, key, value, scale).transpose(1, 2)
    grouped = key.shape[1] != query.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2)


def _probabilities(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Shares of attention, `(batch, heads, seq, slots)`; a sink has what they lack of one."""
    seq, slots = query.shape[2], key.shape[2]
    logits = (query @ _repeat_heads(key, query).mT).float() * scale  # (batch, heads, seq, slots)
    if mask is None:
        mask = torch.ones(seq, slots, dtype=torch.bool, device=query.device).tril()
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]


def _repeat_heads(states: Tensor, query: Tensor) -> Tensor:
    """Repeat key or value heads `(batch, kv heads, ...)` until they match the query's."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)
