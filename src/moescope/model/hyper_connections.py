"""Manifold-constrained hyper-connections (mHC): a residual of several streams.

Instead of one residual stream, a token has `hc_mult`. Each half of a layer reads a weighted sum of
them, adds what it computes to each with a weight of its own, and mixes them by a matrix whose rows
and columns sum to one, so that no depth makes them grow. All weights follow from the streams
themselves (DeepSeek-V4, section 2.2; Xie et al. 2026, arXiv:2512.24880).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.attention import KVCache
from moescope.model.indexer import Picks
from moescope.model.layer import DecoderLayer
from moescope.model.recorder import Recorder


@dataclass(frozen=True)
class Mixing:
    """How half a layer reads and writes the streams of each token, float32.

    Attributes:
        pre: weights of the streams in what it reads, `(batch, seq, hc_mult)`.
        post: of what it computes, in each stream, `(batch, seq, hc_mult)`.
        mix: `(batch, seq, hc_mult, hc_mult)`; entry `i, j` is the share of the old stream `i` in
            the new stream `j`.
    """

    pre: Tensor
    post: Tensor
    mix: Tensor

    def read(self, streams: Tensor) -> Tensor:
        """Map `(batch, seq, hc_mult, hidden)` to `(batch, seq, hidden)`."""
        return (self.pre[..., None] * streams).sum(dim=2).to(streams.dtype)

    def write(self, streams: Tensor, added: Tensor) -> Tensor:
        """Mix the streams, and add `(batch, seq, hidden)` to each."""
        post, mix = self.post.to(streams.dtype), self.mix.to(streams.dtype)
        return post[..., None] * added[:, :, None] + mix.mT @ streams


class HyperConnection(nn.Module):
    """From a token's streams to the weights of one half of a layer.

    `fn` has shape `((2 + hc_mult) * hc_mult, hc_mult * hidden)`: rows for `pre`, `post` and `mix`,
    which have a `scale` each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.streams = streams = config.required("hc_mult")
        self.iterations, self.eps = config.hc_sinkhorn_iters, config.hc_eps
        self.norm_eps = config.rms_norm_eps
        outputs = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(outputs, streams * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(outputs))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, streams: Tensor) -> Mixing:
        """Weigh `(batch, seq, hc_mult, hidden)`."""
        count = self.streams
        parts = [count, count, count * count]
        raw = _mapped(streams, self.fn, self.norm_eps).split(parts, dim=-1)
        pre, post, mix = (
            weights * scale + base
            for weights, scale, base in zip(
                raw, self.scale.float(), self.base.float().split(parts), strict=True
            )
        )
        mix = mix.unflatten(-1, (count, count)).softmax(dim=-1) + self.eps
        return Mixing(
            pre.sigmoid() + self.eps,
            2 * post.sigmoid(),
            doubly_stochastic(mix, self.iterations, self.eps),
        )


class HyperHead(nn.Module):
    """Joins the last layer's streams: `(batch, seq, hc_mult, hidden)` -> `(batch, seq, hidden)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        streams = config.required("hc_mult")
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * config.hidden_size))
        self.hc_base = nn.Parameter(torch.zeros(streams))
        self.hc_scale = nn.Parameter(torch.ones(1))

    def forward(self, streams: Tensor) -> Tensor:
        raw = _mapped(streams, self.hc_fn, self.norm_eps)  # (batch, seq, hc_mult)
        weights = (raw * self.hc_scale.float() + self.hc_base.float()).sigmoid() + self.eps
        return (weights[..., None] * streams).sum(dim=2).to(streams.dtype)


class HyperDecoderLayer(DecoderLayer):
    """A decoder layer whose residual is several streams."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attn_hc, self.ffn_hc = HyperConnection(config), HyperConnection(config)

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        picks: Picks | None = None,
    ) -> Tensor:
        """Map `(batch, seq, hc_mult, hidden)` to the same shape."""
        streams = hidden_states
        mixing = self.attn_hc(streams)
        if recorder is not None:
            recorder.mixing(self.layer_idx, "attention", mixing.pre, mixing.post, mixing.mix)
        added = self.attend(mixing.read(streams), rotation, positions, cache, recorder, picks)
        streams = mixing.write(streams, added)
        mixing = self.ffn_hc(streams)
        if recorder is not None:
            recorder.mixing(self.layer_idx, "feed_forward", mixing.pre, mixing.post, mixing.mix)
        added = self.feed_forward(mixing.read(streams), input_ids, recorder)
        return mixing.write(streams, added)


def doubly_stochastic(weights: Tensor, iterations: int, eps: float) -> Tensor:
    """Scale positive `(..., n, n)` until rows and columns sum to one (Sinkhorn & Knopp 1967)."""
    weights = weights / (weights.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
        weights = weights / (weights.sum(dim=-2, keepdim=True) + eps)
    return weights


def _mapped(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm all streams of a token together, without weights, and map them, in float32."""
    flat = streams.flatten(2).float()
    return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=eps), weight.float())
