"""DeepSeek-V4's attention: a window of the last tokens, and behind it entries of compressed tokens.

All heads share one vector a token that is key and value at once. Layers are of three kinds
(`layer_types`): `sliding_attention` sees the window alone; `heavily_compressed_attention` (HCA,
section 2.3.2) also one entry for every `m'` tokens; `compressed_sparse_attention` (CSA, section
2.3.1) one for every `m`, of which a lightning indexer picks `index_topk`. An entry is seen once all
of its tokens are past. Learned sinks take a share of the softmax and no value.

What compressors map tokens to is kept for every token, so that a text can be cut, joined and padded
anywhere. That takes several times the memory of the entries themselves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.attention import KVCache, visible
from moescope.model.indexer import index_scores, picked_mask
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.model.rope import RotaryEmbedding

SPARSE = "compressed_sparse_attention"


class CompressedAttention(nn.Module):
    """Attention of one vector for keys and values over a window and compressed entries."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.width = config.num_attention_heads, config.qk_head_dim
        self.scale, self.eps = self.width**-0.5, config.rms_norm_eps
        self.window = config.required("sliding_window")
        hidden, rank = config.hidden_size, config.required("q_lora_rank")
        self.q_a_proj = nn.Linear(hidden, rank, bias=False)
        self.q_a_norm = RMSNorm(rank, self.eps)
        self.q_b_proj = nn.Linear(rank, self.heads * self.width, bias=False)
        self.kv_proj = nn.Linear(hidden, self.width, bias=False)
        self.kv_norm = RMSNorm(self.width, self.eps)
        self.groups, o_rank = config.required("o_groups"), config.required("o_lora_rank")
        self.o_a_proj = GroupedLinear(self.groups, self.heads * self.width // self.groups, o_rank)
        self.o_b_proj = nn.Linear(self.groups * o_rank, hidden, bias=False)
        self.sinks = nn.Parameter(torch.zeros(self.heads))
        self.rate = config.compress_rate_of(layer_idx)
        self.rotary_emb: RotaryEmbedding | None = None
        self.compressor: Compressor | None = None
        self.indexer: EntryIndexer | None = None
        if self.rate is not None:
            sparse = config.layer_type_of(layer_idx) == SPARSE
            self.rotary_emb = RotaryEmbedding(config, compressed=True)
            self.compressor = Compressor(hidden, self.width, self.rate, self.eps, overlap=sparse)
            self.indexer = EntryIndexer(config, self.rate) if sparse else None

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape."""
        if self.rotary_emb is not None:  # layers with entries have other angles
            rotation = self.rotary_emb(positions, hidden_states.dtype)
        latents = self.q_a_norm(self.q_a_proj(hidden_states))
        query = self.q_b_proj(latents).unflatten(-1, (self.heads, -1))
        query = F.rms_norm(query.float(), (self.width,), eps=self.eps).to(query.dtype)
        query = rotate_last(query, *rotation)  # (batch, seq, heads, width)
        states = self.kv_norm(self.kv_proj(hidden_states))[:, :, None]
        states = rotate_last(states, *rotation)[:, :, 0]  # (batch, seq, width): keys and values
        if cache is not None:  # the values are none of their own
            states, _ = cache.update(self.layer_idx, states, states[..., :0], positions)
        first = 0
        if recorder is None or not recorder.wants_attention:
            first = max(0, int(positions.min()) - self.window + 1)  # no query sees what is before
        mask = visible(positions, states.shape[1], self.window)[:, 0, :, first:]
        states = states[:, first:]
        in_window = states.shape[1]
        if self.compressor is not None and self.rate is not None:
            entries, seen = self.entries(hidden_states, latents, rotation, positions, cache)
            if recorder is not None and self.indexer is not None:
                recorder.picks(self.layer_idx, seen, self.rate)
            states = torch.cat([states, entries], dim=1)
            mask = torch.cat([mask, seen], dim=-1)  # (batch, seq, slots + entries)
        shares = self.shares(query, states, mask)
        if recorder is not None:
            recorder.sinks(self.layer_idx, shares[..., -1])
            if recorder.wants_attention:
                recorder.attention(self.layer_idx, shares[..., :in_window])
                if self.rate is not None:
                    entry_shares = shares[..., in_window:-1]
                    recorder.entry_attention(self.layer_idx, entry_shares, self.rate)
        output = torch.einsum("bhst,btw->bshw", shares[..., :-1].to(states.dtype), states)
        cos, sin = rotation
        output = rotate_last(output, cos, -sin)  # values were rotated as keys
        return self.o_b_proj(self.o_a_proj(output.flatten(2).unflatten(-1, (self.groups, -1))))

    def entries(
        self,
        hidden_states: Tensor,
        latents: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the entries so far and which of them each query sees.

        Returns:
            `(batch, entries, width)`, and `(batch, seq, entries)` bool.
        """
        compressor, rotary, rate = self.compressor, self.rotary_emb, self.rate
        assert compressor is not None and rotary is not None and rate is not None
        at = self.layer_idx
        entries = compressor(hidden_states, positions, rotary, cache, at, "entries")
        number = torch.arange(entries.shape[1], device=entries.device)
        seen = number < (positions[..., None] + 1) // rate  # their tokens are past
        if self.indexer is not None:
            seen = self.indexer(
                hidden_states, latents, rotation, positions, rotary, cache, at, seen
            )
        return entries, seen

    def shares(self, query: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Return `(batch, heads, seq, slots + 1)` float32; the last column is the sink's."""
        logits = torch.einsum("bshw,btw->bhst", query, states).float() * self.scale
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
        sink = self.sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)


class GroupedLinear(nn.Linear):
    """A map of each group of heads by itself; `weight` is `(groups * outputs, inputs)`."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, groups * outputs, bias=False)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        """Map `(batch, seq, groups, inputs)` to `(batch, seq, groups * outputs)`."""
        weight = self.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("bsgi,goi->bsgo", input, weight).flatten(2)


class Compressor(nn.Module):
    """Joins every `rate` tokens into an entry: a softmax over them, in each number by itself.

    With `overlap` an entry also takes in the tokens of the one before, through maps of their own
    (the first halves of the projections): eq. 9-12, without it eq. 20-23.
    """

    def __init__(self, hidden: int, width: int, rate: int, eps: float, *, overlap: bool) -> None:
        super().__init__()
        self.width, self.rate, self.overlap = width, rate, overlap
        mapped = 2 * width if overlap else width
        self.kv_proj = nn.Linear(hidden, mapped, bias=False)
        self.gate_proj = nn.Linear(hidden, mapped, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(rate, mapped))
        self.kv_norm = RMSNorm(width, eps)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        rotary: RotaryEmbedding,
        cache: KVCache | None,
        layer_idx: int,
        name: str,
    ) -> Tensor:
        """Return all entries so far, `(batch, entries, width)`; the last may lack tokens.

        Args:
            hidden_states: `(batch, seq, hidden)`.
            positions: `(batch, seq)`.
            rotary: angles of an entry, which stands where its first token does.
            cache: keeps what tokens were mapped to, and entries.
            layer_idx: for the cache.
            name: for the cache.
        """
        states, gates = self.kv_proj(hidden_states), self.gate_proj(hidden_states)
        first = positions[:, :1] // self.rate  # (batch, 1)
        if cache is not None:
            states = cache.store(layer_idx, f"{name}: states", states, positions)
            gates = cache.store(layer_idx, f"{name}: gates", gates, positions)
        count = int(((positions[:, -1:] + 1) // self.rate - first).max())  # that end in this pass
        last = (states.shape[1] - 1) // self.rate
        numbers = first + torch.arange(count, device=first.device)
        numbers = numbers.clamp(max=last)  # where other rows end more
        entries = self.entries(states, gates, numbers, rotary)
        if cache is None:
            return entries
        return cache.store(layer_idx, name, entries, numbers, self.rate)

    def entries(
        self, states: Tensor, gates: Tensor, numbers: Tensor, rotary: RotaryEmbedding
    ) -> Tensor:
        """Make the entries `numbers` `(batch, count)` of tokens `(batch, slots, mapped)`."""
        rows = torch.arange(len(numbers), device=numbers.device)[:, None, None]
        tokens = numbers[..., None] * self.rate + torch.arange(self.rate, device=numbers.device)
        tokens = tokens.clamp(max=states.shape[1] - 1)  # (batch, count, rate)
        joined = states[rows, tokens]  # (batch, count, rate, mapped)
        gate = gates[rows, tokens] + self.position_bias
        if self.overlap:
            before = (tokens - self.rate).clamp(min=0)
            gate_before = (gates[rows, before] + self.position_bias)[..., : self.width]
            gate_before = gate_before.masked_fill(numbers[..., None, None] == 0, -torch.inf)
            joined = torch.cat(
                [states[rows, before][..., : self.width], joined[..., self.width :]], dim=2
            )
            gate = torch.cat([gate_before, gate[..., self.width :]], dim=2)
        weights = gate.softmax(dim=2, dtype=torch.float32).to(joined.dtype)
        entries = self.kv_norm((joined * weights).sum(dim=2))[:, :, None]
        return rotate_last(entries, *rotary(numbers * self.rate, entries.dtype))[:, :, 0]


class EntryIndexer(nn.Module):
    """Picks entries by narrow entries of its own (DeepSeek-V4, eq. 13-17), as `indexer.Indexer`."""

    def __init__(self, config: ModelConfig, rate: int) -> None:
        super().__init__()
        self.heads, self.width = config.required("index_n_heads"), config.required("index_head_dim")
        self.top_k = config.required("index_topk")
        hidden, rank = config.hidden_size, config.required("q_lora_rank")
        self.compressor = Compressor(hidden, self.width, rate, config.rms_norm_eps, overlap=True)
        self.q_b_proj = nn.Linear(rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(hidden, self.heads, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        latents: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        rotary: RotaryEmbedding,
        cache: KVCache | None,
        layer_idx: int,
        past: Tensor,
    ) -> Tensor:
        """Return which entries queries see, `(batch, seq, entries)` bool, of those that are past.

        Args:
            hidden_states: `(batch, seq, hidden)`.
            latents: of the queries, `(batch, seq, q_lora_rank)`.
            rotation: of the queries.
            positions: `(batch, seq)`.
            rotary: angles of entries.
            cache: as `Compressor`'s.
            layer_idx: for the cache.
            past: `(batch, seq, entries)` bool.
        """
        keys = self.compressor(hidden_states, positions, rotary, cache, layer_idx, "index")
        if keys.shape[1] <= self.top_k:
            return past
        query = self.q_b_proj(latents).unflatten(-1, (self.heads, -1))
        query = rotate_last(query, *rotation)  # (batch, seq, heads, width)
        scores = index_scores(query, keys, self.weights_proj(hidden_states))
        picks = scores.masked_fill(~past, -torch.inf).topk(self.top_k, dim=-1).indices
        return past & picked_mask(picks, keys.shape[1])


def rotate_last(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last numbers of `(batch, seq, heads, width)`, in pairs of neighbours.

    Angles `(batch, seq, 1, pairs)` are those of `RotaryEmbedding`.
    """
    rotated = 2 * cos.shape[-1]
    rest, pairs = states[..., :-rotated], states[..., -rotated:].float()
    first, second = pairs[..., 0::2], pairs[..., 1::2]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rest, turned.flatten(-2).to(states.dtype)], dim=-1)
