"""Chunks of texts into logits: the network, over a cache of blocks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.engine.blocks import Blocks
from moescope.engine.scheduler import Chunk
from moescope.model.cache import BlockPool
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.native.decoder import NativeDecoder

BLOCK_TOKENS = 64
"""Tokens of a block; as many as the native attention visits at a time."""


def block_tokens(config: ModelConfig) -> int:
    """Tokens of a block of a network's cache: whole windows of those that layers compress."""
    rates = {config.compress_rate_of(layer_idx) for layer_idx in range(config.num_hidden_layers)}
    multiple = math.lcm(*(rate for rate in rates if rate))
    return -(-BLOCK_TOKENS // multiple) * multiple


class Runner:
    """Computes what follows the chunks of a step.

    Args:
        model: the network.
        blocks: in which texts lie; whoever hands them out does it here.
    """

    def __init__(self, model: CausalLM, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        self.pool = BlockPool(blocks.size, blocks.limit)
        self.device = model.lm_head.weight.device

    def run(self, chunks: Sequence[Chunk], recorder: Recorder | None = None) -> Tensor:
        """Read chunks, single tokens first.

        Returns:
            Logits after each chunk that is its text's last, `(texts, vocab)` float32, in order.
        """
        decoder = self.model.model
        if isinstance(decoder, NativeDecoder) and recorder is None and decoder.is_joined:
            self.prepare(clean=False)  # the kernels read no slot beyond a text's last
            states = self._together(decoder, chunks)
        else:
            self.prepare(clean=True)
            states = self._by_length(chunks, recorder)
        if not any(chunk.is_last for chunk in chunks):
            return torch.empty(0, self.model.config.vocab_size)
        last = torch.stack([s for s, chunk in zip(states, chunks, strict=True) if chunk.is_last])
        return self.model.logits(self.model.model.norm(last))

    def prepare(self, *, clean: bool) -> None:
        """See that all blocks are there and begin as they should.

        Args:
            clean: as for `BlockPool.move`.
        """
        self.pool.grow(self.blocks.count)
        for move in self.blocks.moves:
            self.pool.move(move.block, move.source, move.tokens, clean=clean)
        self.blocks.moves.clear()

    def _together(self, decoder: NativeDecoder, chunks: Sequence[Chunk]) -> list[Tensor]:
        """The last hidden state `(hidden,)` of each chunk, in one pass over the weights."""
        counts = torch.tensor([0, *(chunk.count for chunk in chunks)])
        starts = counts.cumsum(0)
        states = decoder.run_rows(
            torch.tensor([token_id for chunk in chunks for token_id in chunk.ids]),
            torch.tensor([at for c in chunks for at in range(c.start, c.start + c.count)]),
            starts,
            sum(chunk.is_single for chunk in chunks),
            self.pool.rows([chunk.sequence.blocks for chunk in chunks], _length(chunks)),
            _length(chunks),
        )
        return list(states[starts[1:] - 1])

    def _by_length(self, chunks: Sequence[Chunk], recorder: Recorder | None) -> list[Tensor]:
        """The same, in one pass for all chunks of the same number of tokens."""
        states: dict[Chunk, Tensor] = {}
        for batch in by_length(chunks):
            count = batch[0].count
            cache = self.pool.rows([chunk.sequence.blocks for chunk in batch], _length(batch))
            hidden_states = self.model.model(
                self._tensor([chunk.ids for chunk in batch]),
                self._tensor([list(range(c.start, c.start + count)) for c in batch]),
                cache,
                recorder,
            )  # (batch, count, hidden)
            states.update(zip(batch, hidden_states[:, -1], strict=True))
        return [states[chunk] for chunk in chunks]

    def _tensor(self, numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def by_length(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks of the same number of tokens, together: a pass each, with a recorder at any rate."""
    counts = dict.fromkeys(chunk.count for chunk in chunks)
    return [[chunk for chunk in chunks if chunk.count == count] for count in counts]


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
