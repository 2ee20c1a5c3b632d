"""All layers in one call."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moescope.kernels import cpu
from moescope.model.attention import KVCache, LatentAttention
from moescope.model.cache import BlockRows, Cache
from moescope.model.decoder import Decoder
from moescope.model.layer import DecoderLayer
from moescope.model.recorder import Recorder
from moescope.model.routing import Router
from moescope.native.embedding import PackedEmbedding
from moescope.native.experts import NativeMLP, NativeMoE
from moescope.native.grouped_attention import NativeGroupedAttention
from moescope.native.latent_attention import NativeLatentAttention
from moescope.native.router import native_routers

NativeAttention = NativeLatentAttention | NativeGroupedAttention


class NativeDecoder(Decoder):
    """All layers in one call, unless somebody looks on or a part is PyTorch's alone.

    Such are some routers' rules, indexers, compressed attention and residuals of several streams:
    their layers run one by one, with projections and experts on the kernels.
    """

    def __init__(self, decoder: Decoder) -> None:
        nn.Module.__init__(self)
        for name, child in decoder.named_children():
            setattr(self, name, child)
        self.embedding_multiplier = decoder.embedding_multiplier
        self.streams, self.hc_head = decoder.streams, decoder.hc_head
        self.attention: list[cpu.Attention] = []
        layers = cast("list[DecoderLayer]", list(self.layers))
        self._mlps = [layer.mlp for layer in layers]  # a step asks for each one's gate
        self._width = decoder.embed_tokens.embedding_dim
        halves = [layer.self_attn for layer in layers]
        known = [half for half in halves if isinstance(half, NativeAttention)]
        sparse = any(isinstance(half, LatentAttention) and half.sparse for half in known)
        if len(known) == len(layers) and not sparse:
            self.slot_form = known[0].slot_form
            self.attention = [
                attention.block(layer.input_layernorm, layer.residual_multiplier)
                for layer, attention in zip(layers, known, strict=True)
            ]
        self._join(self._gates(), layers)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Run all layers over `(batch, seq)` ids; return `(batch, seq, hidden)` before the norm."""
        slots = Cache() if cache is None else cache
        if recorder is not None or not isinstance(slots, Cache | BlockRows) or not self.is_joined:
            return super().forward(input_ids, positions, cache, recorder)
        batch, seq = input_ids.shape
        if positions is None:
            positions = torch.arange(seq).expand_as(input_ids)
        states = self.run_rows(
            input_ids.flatten().tolist(),
            positions.flatten().tolist(),
            range(0, (batch + 1) * seq, seq),
            batch if seq == 1 else 0,
            slots,
            int(positions.max()) + 1,
        )
        return states.view(batch, seq, -1)

    @property
    def is_joined(self) -> bool:
        """Whether all layers are one call."""
        gates = self._gates()
        if gates != self.joined_gates:  # a copy was given others, as steering does
            self._join(gates, cast("list[DecoderLayer]", list(self.layers)))
        return self.all_layers is not None

    def run_rows(
        self,
        input_ids: Sequence[int],
        positions: Sequence[int],
        starts: Sequence[int],
        singles: int,
        cache: Cache | BlockRows,
        length: int,
        wanted: Sequence[int] | None = None,
        others: cpu.RowRouters | None = None,
        chosen: cpu.Chosen | None = None,
    ) -> Tensor:
        """Run all layers over rows of unequal length, where `is_joined`.

        Args:
            input_ids: one row's tokens after the other's.
            positions: of the tokens.
            starts: where rows begin, and the end.
            singles: rows, the first ones, of one token that is read as generated ones are.
            cache: of the rows.
            length: of the longest text, with these tokens.
            wanted: the tokens, in order, whose outputs are wanted; None for all.
            others: routers, of `joined_routers`, of rows that have others than this network.
            chosen: made by `choices`, gets what is chosen.

        Returns:
            `(wanted, hidden)` before the norm.
        """
        assert self.all_layers is not None
        held, tables = cache.reserve(
            len(self._mlps), len(starts) - 1, self.slot_form, length, cpu.cache_slots
        )
        return cpu.run_decoder(
            self.all_layers,
            input_ids,
            self._width,
            positions,
            starts,
            singles,
            tables,
            held,
            wanted,
            others,
            chosen,
        )

    def choices(
        self, tokens: int, others: cpu.RowRouters | None, *, ids_alone: bool = False
    ) -> cpu.Chosen:
        """Room for what all routers choose for so many tokens, or for the experts' ids alone."""
        assert self.all_layers is not None
        return cpu.choices(self.all_layers, self._sparse, tokens, others, ids_alone=ids_alone)

    def joined_routers(self, gates: Mapping[int, Router]) -> "list[cpu.Router | None]":
        """The routers of all layers, with other gates of known rules in some, for the one call."""
        rules = native_routers([gates.get(at, own) for at, own in enumerate(self._gates())])
        assert rules is not None
        return rules

    def _gates(self) -> list[Router | None]:
        """The routers by layer, None where one is dense."""
        # Each step asks; `mlp.gate` would take ten times as long.
        return [vars(mlp)["_modules"].get("gate") for mlp in self._mlps]

    def _join(self, gates: list[Router | None], layers: "list[DecoderLayer]") -> None:
        """Put all layers into one call; there is none where a router is not the kernels'."""
        self.joined_gates = gates
        self._sparse = sum(gate is not None for gate in gates)
        self.all_layers: cpu.Decoder | None = None
        if not self.attention:
            return
        rules = native_routers(gates)
        if rules is None:
            return
        blocks: list[cpu.FeedForwardBlock] = []
        for layer, rule in zip(layers, rules, strict=True):
            norm = layer.post_attention_layernorm
            experts = cast("NativeMLP | NativeMoE", layer.mlp).layer
            blocks.append(
                cpu.feed_forward_block(
                    (norm.weight, norm.eps), rule, experts, layer.residual_multiplier
                )
            )
        self.all_layers = cpu.decoder(
            cast(PackedEmbedding, self.embed_tokens).packed,
            self.attention,
            blocks,
            (self.rotary_emb.inv_freq, self.rotary_emb.attention_factor),
            self.embedding_multiplier,
        )
