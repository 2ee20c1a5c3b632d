"""Which tokens have embeddings that point the same way."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.native.embedding import PackedEmbedding
from moescope.scope.steps import legible
from moescope.text.tokenizer import Tokenizer

NEIGHBOURS = 8
ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Neighbour:
    """A token whose embedding points the same way; `similarity` is the cosine."""

    id: int
    text: str
    similarity: float


def neighbours(table: nn.Embedding, tokenizer: Tokenizer, token_id: int) -> list[Neighbour]:
    """Return the tokens with the embeddings most similar to one's, the nearest first."""
    known = _known_neighbours.setdefault(table, {})
    if token_id not in known:
        known[token_id] = _find(table, tokenizer, token_id)
    return known[token_id]


_known_neighbours: WeakKeyDictionary[nn.Embedding, dict[int, list[Neighbour]]] = WeakKeyDictionary()
_known_lengths: WeakKeyDictionary[nn.Embedding, Tensor] = WeakKeyDictionary()


def _find(table: nn.Embedding, tokenizer: Tokenizer, token_id: int) -> list[Neighbour]:
    own = table(torch.tensor(token_id, device=table.weight.device))  # (hidden,)
    # In the table's own type over all of it, then in float32 over the nearest: (vocab,)
    packed = isinstance(table, PackedEmbedding)
    products = table.products(own) if packed else (table.weight @ own).float()
    roughly = products / _lengths(table)
    roughly[token_id] = -torch.inf
    near = roughly.topk(min(4 * NEIGHBOURS, roughly.shape[0] - 1)).indices
    similarity = F.cosine_similarity(table(near).float(), own.float()[None])
    best = similarity.topk(min(NEIGHBOURS, len(near)))
    return [
        Neighbour(i, legible(tokenizer, i), cosine)
        for i, cosine in zip(near[best.indices].tolist(), best.values.tolist(), strict=True)
    ]


def _lengths(embedding: nn.Embedding) -> Tensor:
    """Length of each token's vector, computed once: `(vocab,)` float32."""
    if embedding not in _known_lengths:
        ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
        parts = [embedding(some).float().norm(dim=-1) for some in ids.split(ROWS_AT_A_TIME)]
        _known_lengths[embedding] = torch.cat(parts).clamp(min=1e-30)
    return _known_lengths[embedding]
