"""The lightning indexer: which earlier tokens a query may see (DeepSeek-V3.2, section 2.1).

DeepSeek Sparse Attention scores every earlier token with a few narrow heads and attends to the
`index_topk` best alone. While a text is no longer than that, attention is dense and nothing is
scored. GLM-5 lets some layers take over what an earlier layer's indexer picked (`indexer_types`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.rope import rotate

KEY_NORM_EPS = 1e-6
"""DeepSeek's indexer uses this constant, not `rms_norm_eps`."""


@dataclass
class Picks:
    """What the last indexer of a pass picked, which later layers may share.

    Attributes:
        slots: `(batch, seq, index_topk)` int64, the best first; None where all are seen. Where a
            query has fewer slots to see, those behind stand for nothing.
    """

    slots: Tensor | None = None


class Indexer(nn.Module):
    """Scores of the slots before a query: `sum over heads of w * relu(q . k)` (eq. 1).

    The released weights rotate queries and keys by a Hadamard matrix and round them to FP8, for
    speed; the first changes no product and the second is left out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width = config.required("index_n_heads"), config.required("index_head_dim")
        self.top_k = config.required("index_topk")
        self.interleave = config.indexer_rope_interleave
        rank, hidden = config.required("q_lora_rank"), config.hidden_size
        self.wq_b = nn.Linear(rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(hidden, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, KEY_NORM_EPS)
        self.weights_proj = nn.Linear(hidden, self.heads, bias=False)

    def keys(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Map `(batch, seq, hidden)` to what later queries compare, `(batch, seq, width)`."""
        keys = self.k_norm(self.wk(hidden_states))[:, :, None]
        return rotate(keys, *rotation, interleave=self.interleave)[:, :, 0]

    def pick(
        self,
        hidden_states: Tensor,
        query_latents: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        seen: Tensor,
    ) -> Tensor | None:
        """Return the slots that each query attends to, the best first; None for all.

        Args:
            hidden_states: `(batch, seq, hidden)`.
            query_latents: `(batch, seq, q_lora_rank)`, normed.
            rotation: of the queries.
            keys: `(batch, slots, width)`.
            seen: `(batch, seq, slots)` bool, which of them are not in the future.

        Returns:
            `(batch, seq, index_topk)` int64.
        """
        if keys.shape[1] <= self.top_k:
            return None
        query = self.wq_b(query_latents).unflatten(-1, (self.heads, -1))
        query = rotate(query, *rotation, interleave=self.interleave)  # (batch, seq, heads, width)
        weights = self.weights_proj(hidden_states)
        scores = index_scores(query, keys, weights).masked_fill(~seen, -torch.inf)
        return scores.topk(self.top_k, dim=-1).indices


def index_scores(query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Score slots for queries, in float32.

    Args:
        query: `(batch, seq, heads, width)`.
        keys: `(batch, slots, width)`, of all heads.
        weights: of the heads, `(batch, seq, heads)`.

    Returns:
        `(batch, seq, slots)`.
    """
    heads, width = query.shape[2:]
    products = query.float() @ keys.float()[:, None].mT  # (batch, seq, heads, slots)
    weights = weights.float() * (heads * width) ** -0.5
    return (weights[:, :, None] @ products.relu())[:, :, 0]


def picked_mask(picks: Tensor, slots: int) -> Tensor:
    """Return `(batch, seq, slots)` bool, True at the picks `(batch, seq, index_topk)`."""
    mask = torch.zeros(*picks.shape[:2], slots, dtype=torch.bool, device=picks.device)
    return mask.scatter_(-1, picks, True)
