"""Token files to batches: packed rows for training, held-out rows in order.

A row of a batch comes from one domain, because specialisation is measured per domain. The order
is a function of the seed alone, and a position in it is a few numbers, so a training continues
with exactly the batches that it would have seen.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.training.data import ShardIndex


class PackedBatches:
    """Endless training batches; each row is packed end to end from documents of one domain.

    A row holds sequence_length + 1 ids, of which the last begins the domain's next row, so that
    every token is predicted once an epoch. Documents are shuffled anew each epoch. The domain of
    each row is drawn by `domain_weights`.

    Raises:
        UserError: a weight is missing, unknown or negative, or all are zero.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        domain_weights: dict[str, float] | None = None,
    ):
        self._index = index
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._seed = seed
        self._weights = _weights(index.domains, domain_weights)
        self._batch = 0
        self._streams = [_Stream(index, domain_id, seed) for domain_id in range(len(index.shards))]

    def next(self) -> tuple[Tensor, Tensor]:
        """Return token ids (batch, sequence_length + 1) and domain ids (batch,), both int64."""
        rng = np.random.default_rng([self._seed, 0, self._batch])
        domain_ids = rng.choice(len(self._streams), size=self._batch_size, p=self._weights)
        rows = np.stack([self._streams[i].take(self._sequence_length) for i in domain_ids])
        self._batch += 1
        return torch.from_numpy(rows), torch.from_numpy(domain_ids.astype(np.int64))

    def planned_epochs(self, steps: int) -> dict[str, float]:
        """Return how often each domain's text will have been read after `steps` batches."""
        rows = steps * self._batch_size * self._weights
        tokens = [shard.tokens for shard in self._index.shards]
        return {
            domain: float(rows[i] * self._sequence_length / tokens[i])
            for i, domain in enumerate(self._index.domains)
        }

    def epochs(self) -> dict[str, float]:
        """Return how often each domain's text has been read by now."""
        return {
            domain: stream.epochs()
            for domain, stream in zip(self._index.domains, self._streams, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON-able numbers; the batches after it depend on nothing else."""
        return {
            "data": self._index.fingerprint,
            "seed": self._seed,
            "batch": self._batch,
            "texts": self._texts(),
            "domains": {
                domain: stream.position()
                for domain, stream in zip(self._index.domains, self._streams, strict=True)
            },
        }

    def read_on(self, state: dict[str, Any]) -> None:
        """Go on from another training's position, in each domain whose text is what it read.

        A domain with other text, a new one, and all of them under another seed, are read from
        their start.
        """
        if state["seed"] != self._seed:
            return
        texts = state.get("texts", {})
        for domain, ours in self._texts().items():
            if texts.get(domain) == ours:
                self._streams[ours["order"]].seek(**state["domains"][domain])
        self._batch = state["batch"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: it was saved with other text, another tokenizer or another seed.
        """
        for name, ours in (("data", self._index.fingerprint), ("seed", self._seed)):
            if state[name] != ours:
                raise UserError(
                    f"the saved position belongs to {name} {state[name]}, not {ours}; resume with "
                    "the same text, tokenizer and seed, or start a new training"
                )
        self._batch = state["batch"]
        for domain, stream in zip(self._index.domains, self._streams, strict=True):
            stream.seek(**state["domains"][domain])

    def _texts(self) -> dict[str, dict[str, int]]:
        """Return what the order of each domain's documents depends on, beside the seed."""
        return {
            shard.domain: {"order": i, "crc": shard.tokens_crc}
            for i, shard in enumerate(self._index.shards)
        }


class _Stream:
    """One domain's documents, epoch after epoch, as an endless run of token ids."""

    def __init__(self, index: ShardIndex, domain_id: int, seed: int):
        self._index = index
        self._domain_id = domain_id
        self._seed = seed
        self.seek(epoch=0, document=0, offset=0)

    def position(self) -> dict[str, int]:
        return {"epoch": self._epoch, "document": self._document, "offset": self._offset}

    def epochs(self) -> float:
        lengths = self._index.document_lengths(self._domain_id)
        read = lengths[self._order[: self._document]].sum() + self._offset
        return float(self._epoch + read / lengths.sum())

    def seek(self, epoch: int, document: int, offset: int) -> None:
        self._epoch, self._document, self._offset = epoch, document, offset
        self._order = self._shuffled(epoch)

    def take(self, length: int) -> npt.NDArray[np.int64]:
        """Return length + 1 ids and move on by length."""
        row = np.empty(length + 1, dtype=np.int64)
        filled = 0
        while True:
            document = self._index.document(self._domain_id, self._order[self._document])
            piece = document[self._offset : self._offset + length + 1 - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == length + 1:
                self._offset += len(piece) - 1
                return row
            self._advance()

    def _advance(self) -> None:
        self._offset = 0
        self._document += 1
        if self._document == len(self._order):
            self.seek(self._epoch + 1, 0, 0)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, 1, self._domain_id, epoch])
        return rng.permutation(self._index.shards[self._domain_id].documents)


def _weights(domains: Sequence[str], weights: dict[str, float] | None) -> npt.NDArray[np.float64]:
    chosen = dict.fromkeys(domains, 1.0) if weights is None else weights
    if set(chosen) != set(domains):
        raise UserError(
            f"the domain weights name {', '.join(sorted(chosen))}, but the text has "
            f"{', '.join(domains)}; give each of these one weight"
        )
    values = np.array([chosen[domain] for domain in domains], dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise UserError(
            f"the domain weights {chosen} cannot be drawn from; give numbers of 0 or more, "
            "not all 0"
        )
    return values / values.sum()


class HeldOutBatches:
    """One pass over the start of a held-out domain, in order, each token predicted once.

    Attributes:
        n_tokens: predicted tokens in all batches together.
        n_bytes: UTF-8 bytes of text that these stand for; bits per byte is the summed loss in
            nats / (ln 2 * n_bytes).

    A domain with fewer than sequence_length + 1 tokens gives one shorter row.

    Raises:
        UserError: the domain has no held-out text.
    """

    def __init__(
        self,
        index: ShardIndex,
        domain: str,
        batch_size: int,
        sequence_length: int,
        max_tokens: int,
    ):
        if domain not in index.domains:
            raise UserError(
                f"there is no held-out text of domain {domain}; choose from "
                f"{', '.join(index.domains) or 'none: add documents'}"
            )
        domain_id = index.domains.index(domain)
        available = index.shards[domain_id].tokens - 1
        self._length = min(sequence_length, available)
        rows = max(1, min(available, max_tokens) // self._length)
        self._batch_size = batch_size
        self._ids = index.tokens(domain_id, 0, rows * self._length + 1)
        self.n_tokens = rows * self._length
        self.n_bytes = index.text_bytes(self._ids[1:])

    def __iter__(self) -> Iterator[Tensor]:
        """Yield token ids (rows <= batch_size, sequence_length + 1), int64."""
        windows = np.lib.stride_tricks.sliding_window_view(self._ids, self._length + 1)
        rows = windows[:: self._length]
        for start in range(0, len(rows), self._batch_size):
            yield torch.from_numpy(rows[start : start + self._batch_size].copy())
