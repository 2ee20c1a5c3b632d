"""Chunks of texts into logits: the network, over a cache of blocks."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.engine.blocks import Blocks
from moescope.engine.prompt_logprobs import score_prompt
from moescope.engine.routed import ExpertLoad, RoutingRecorder, deal_out
from moescope.engine.scheduler import Chunk
from moescope.kernels.cpu import Chosen, RowRouters
from moescope.model.cache import BlockPool
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.model.steering import moe_layers
from moescope.native.decoder import NativeDecoder
from moescope.native.head import NativeHead

ROWS_OF_AN_EXPERT = 12
"""Tokens with which an expert's product takes about as long as reading its weights."""
TURN_TOKENS = 48
"""Tokens that attend to latents about as soon as to keys and values that are spread first."""
BLOCK_TOKENS = 64
"""Tokens of a block; as many as the native attention visits at a time."""


def block_tokens(config: ModelConfig) -> int:
    """Tokens of a block of a network's cache: whole windows of those that layers compress."""
    rates = {config.compress_rate_of(layer_idx) for layer_idx in range(config.num_hidden_layers)}
    multiple = math.lcm(*(rate for rate in rates if rate))
    return -(-BLOCK_TOKENS // multiple) * multiple


def tokens_beside(model: CausalLM) -> int | None:
    """Return how many tokens of prompts to read beside texts that are continued; None for any.

    So many that experts are not read in vain, and no more, for the others wait meanwhile. Where
    prompts have a pass of their own anyway, nothing is said.
    """
    config, decoder = model.config, model.model
    joined = isinstance(decoder, NativeDecoder) and decoder.is_joined
    if not joined or config.n_routed_experts is None:
        return None
    return ROWS_OF_AN_EXPERT * config.n_routed_experts // config.required("num_experts_per_tok")


def short_turn(model: CausalLM) -> int:
    """Return how many new tokens of a conversation to read one by one; 0 where it gains nothing.

    Latent attention spreads the keys and values of all tokens before a piece of a prompt anew. Few
    tokens attend to the latents themselves, as one does that was made.
    """
    decoder = model.model
    joined = isinstance(decoder, NativeDecoder) and decoder.is_joined
    return TURN_TOKENS if joined and model.config.uses_mla else 0


class Runner:
    """Computes what follows the chunks of a step.

    Args:
        model: the network.
        blocks: in which texts lie; whoever hands them out does it here.

    Attributes:
        load: how many tokens each expert has been given; not where a recorder looked on.
    """

    def __init__(self, model: CausalLM, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        self.pool = BlockPool(blocks.size, blocks.limit)
        self.device = model.lm_head.weight.device
        self._head = NativeHead(model) if NativeHead.is_native(model) else None
        self.load = ExpertLoad(list(moe_layers(model)), model.config.n_routed_experts or 0)

    def run(self, chunks: Sequence[Chunk], recorder: Recorder | None = None) -> Tensor:
        """Read chunks, single tokens first, and note what texts want to know of their tokens.

        Returns:
            Logits after each chunk that is its text's last, `(texts, vocab)` float32, in order.
        """
        decoder = self.model.model
        if isinstance(decoder, NativeDecoder) and recorder is None and decoder.is_joined:
            self.prepare(clean=False)  # the kernels read no slot beyond a text's last
            kept = [chunk.wanted for chunk in chunks]
            states = self._together(decoder, chunks)
        else:
            self.prepare(clean=True)
            kept = [chunk.count for chunk in chunks]
            states = self._by_length(chunks, recorder)
        ends = [*accumulate(kept)]  # of the chunks among the states
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.sequence.prompt_logprobs is not None:
                own = states[end - chunk.count : end]
                score_prompt(chunk.sequence, chunk.start, own, self._logits)
        last = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last]
        if not last:
            return torch.empty(0, self.model.config.vocab_size)
        return self._logits(states if len(last) == states.shape[0] else states[last])

    def prepare(self, *, clean: bool) -> None:
        """See that all blocks are there and begin as they should.

        Args:
            clean: as for `BlockPool.move`.
        """
        self.pool.grow(self.blocks.count)
        for move in self.blocks.moves:
            self.pool.move(move.block, move.source, move.tokens, clean=clean)
        self.blocks.moves.clear()

    def _logits(self, states: Tensor) -> Tensor:
        if self._head is not None:
            return self._head(states)
        return self.model.logits(self.model.model.norm(states))

    def _together(self, decoder: NativeDecoder, chunks: Sequence[Chunk]) -> Tensor:
        """The hidden states `(wanted, hidden)` of all chunks, in one pass over the weights."""
        starts = [*accumulate((chunk.count for chunk in chunks), initial=0)]
        ends = zip(chunks, starts[1:], strict=True)
        others, length = _row_routers(chunks), _length(chunks)
        asked = any(chunk.sequence.params.routed_experts for chunk in chunks)
        chosen = decoder.choices(starts[-1], others, ids_alone=not asked)
        states = decoder.run_rows(
            [token_id for chunk in chunks for token_id in chunk.ids],
            [at for c in chunks for at in range(c.start, c.start + c.count)],
            starts,
            sum(chunk.is_single for chunk in chunks),
            self.pool.rows([chunk.sequence.blocks for chunk in chunks], length),
            length,
            [token for chunk, end in ends for token in range(end - chunk.wanted, end)],
            others,
            chosen,
        )
        self._note(chosen, chunks)
        return states

    def _by_length(self, chunks: Sequence[Chunk], recorder: Recorder | None) -> Tensor:
        """The same, in one pass for all chunks of the same number of tokens and steering."""
        states: dict[Chunk, Tensor] = {}
        own = RoutingRecorder()
        for batch in by_length(chunks):
            count, steered = batch[0].count, batch[0].sequence.steered
            network = self.model if steered is None else steered.network
            cache = self.pool.rows([chunk.sequence.blocks for chunk in batch], _length(batch))
            hidden_states = network.model(
                self._tensor([chunk.ids for chunk in batch]),
                self._tensor([list(range(c.start, c.start + count)) for c in batch]),
                cache,
                recorder or own,
            )  # (batch, count, hidden)
            states.update(zip(batch, hidden_states, strict=True))
            if (chosen := own.chosen()) is not None:
                self._note(chosen, batch)
        return torch.cat([states[chunk] for chunk in chunks])

    def _note(self, chosen: Chosen, chunks: Sequence[Chunk]) -> None:
        if self.load.layers:
            self.load.add(chosen)
            deal_out(chosen, chunks, self.load.layers)

    def _tensor(self, numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def by_length(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks of the same number of tokens, and of the same routers, together: a pass each."""
    kinds = dict.fromkeys((chunk.count, chunk.sequence.steered) for chunk in chunks)
    return [[c for c in chunks if (c.count, c.sequence.steered) == kind] for kind in kinds]


def _row_routers(chunks: Sequence[Chunk]) -> RowRouters | None:
    """The routers of those texts that have their own."""
    steerings = [chunk.sequence.steered for chunk in chunks]
    distinct = [steered for steered in dict.fromkeys(steerings) if steered is not None]
    if not distinct:
        return None
    places = {None: -1} | {steered: at for at, steered in enumerate(distinct)}
    sets = [steered.routers for steered in distinct]
    return RowRouters(sets, [places[steered] for steered in steerings])


def _length(chunks: Sequence[Chunk]) -> int:
    return max(chunk.start + chunk.count for chunk in chunks)


def bytes_per_block(model: CausalLM, size: int) -> int:
    """Have one token read, and see what a block of so many takes."""
    pool = BlockPool(size)
    device = model.lm_head.weight.device
    pool.grow(2)
    with torch.inference_mode():
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        model.model(first, first, pool.rows([[1]], 1))
    return pool.block_bytes
