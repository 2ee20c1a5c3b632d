"""All layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.routing import Chosen, RowRouters
from moescope.kernels.cpu.tensors import memory_of, memory_or_none

if TYPE_CHECKING:
    from moescope.kernels._native import (
        Attention,
        CacheSlots,
        Decoder,
        FeedForward,
        FeedForwardBlock,
        Head,
        Router,
        Weights,
    )


def feed_forward_block(
    norm: tuple[Tensor, float],
    rule: Router | None,
    layer: FeedForward,
    residual_multiplier: float = 1.0,
) -> FeedForwardBlock:
    """Join a norm, a router (None for a dense layer) and experts: half a layer of `decoder`."""
    weight = memory_of(norm[0].detach())
    return extension.native.feed_forward_block(weight, norm[1], rule, layer, residual_multiplier)


def decoder(
    embedding: Weights,
    attention: list[Attention],
    feed_forward: list[FeedForwardBlock],
    rotation: tuple[Tensor, float],
    embedding_multiplier: float = 1.0,
) -> Decoder:
    """Join an embedding and all layers into one call for `run_decoder`.

    Args:
        embedding: `(vocab, hidden)`, packed.
        attention: of each layer.
        feed_forward: of each layer.
        rotation: frequencies `(rotated width / 2,)` of rotary positions, and the factor of
            cosine and sine.
        embedding_multiplier: of what the embedding hands on.
    """
    frequencies, factor = rotation
    return extension.native.decoder(
        embedding,
        attention,
        feed_forward,
        memory_of(frequencies.float().contiguous()),
        factor,
        embedding_multiplier,
    )


def cache_slots(slots: list[tuple[Tensor, Tensor]]) -> CacheSlots:
    """Make the cache of all layers ready for `run_decoder`, whose calls write to the same tensors.

    Args:
        slots: for each layer keys and values, `(blocks, slots, ...)`, all bf16 or all float32; for
            latent attention the latents and the rotated keys.
    """
    return extension.native.CacheSlots(
        [memory_of(keys.flatten(2)) for keys, _ in slots],
        [memory_of(values.flatten(2)) for _, values in slots],
    )


def run_decoder(
    layers: Decoder,
    input_ids: Sequence[int],
    hidden: int,
    positions: Sequence[int],
    starts: Sequence[int],
    singles: int,
    tables: Sequence[Sequence[int]],
    slots: CacheSlots,
    wanted: Sequence[int] | None = None,
    others: RowRouters | None = None,
    chosen: Chosen | None = None,
) -> Tensor:
    """Embed the tokens of several rows and run all layers: `(wanted, hidden)` float32.

    Args:
        layers: made by `decoder`.
        input_ids: of the tokens, below the rows of the embedding, one row after the other.
        hidden: width of the embedding.
        positions: of the tokens, each in one of its row's blocks.
        starts: where the rows begin among the tokens, and the end: one more than there are rows.
        singles: how many rows, the first ones, have one token that is read as generated ones are.
        tables: for each row the blocks in which its slots lie, in order; all of one length.
        slots: to which the new tokens' keys and values are written.
        wanted: the tokens, in order, whose outputs are wanted, None for all; of the others the last
            layer does no more than store keys and values. The numbers of the wanted are the same.
        others: routers of rows that have others than the network; no other row's numbers change.
        chosen: made by `choices`, gets what is chosen; nothing where the last layer was not asked.
    """
    wanted = range(len(input_ids)) if wanted is None else wanted
    out = torch.empty(len(input_ids), hidden)
    layers(
        input_ids,
        positions,
        starts,
        singles,
        tables,
        slots,
        [] if others is None else others.sets,
        [] if others is None else others.set_of_row,
        wanted,
        None if chosen is None else memory_of(chosen.ids),
        None if chosen is None else memory_or_none(chosen.weights),
        None if chosen is None else memory_or_none(chosen.scores),
        memory_of(out),
    )
    return out if len(wanted) == len(input_ids) else out[: len(wanted)]


def head(norm: tuple[Tensor, float], weights: Weights, bias: Tensor | None = None) -> Head:
    """Join the last norm and the map to logits into one call for `run_head`."""
    return extension.native.head(
        memory_of(norm[0].detach()), norm[1], weights, memory_or_none(bias)
    )


def run_head(head: Head, outputs: int, states: Tensor) -> Tensor:
    """Map `(rows, hidden)` of the last layer to `(rows, outputs)` float32."""
    out = torch.empty(states.shape[0], outputs)
    head(memory_of(states.float().contiguous()), memory_of(out))
    return out
