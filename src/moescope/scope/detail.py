"""One token in one layer, taken apart: what attention, router and experts made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams, choose, distribution, draw, penalised
from moescope.errors import UserError
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.model.layer import DecoderLayer
from moescope.model.moe import MoE
from moescope.model.steering import SteeredRouter, Steering, moe_layers
from moescope.native.experts import NativeExperts
from moescope.scope.attended import Attended, attend_again
from moescope.scope.neighbours import Neighbour, neighbours
from moescope.scope.parts import WHOLE, Parts
from moescope.scope.recording import TraceRecorder, chosen
from moescope.scope.steps import TokenStep, describe, legible
from moescope.scope.trace import Candidate

CANDIDATES = 40
LENS_CANDIDATES = 5


@dataclass(frozen=True)
class Seen:
    """What an indexer lets one token see (DeepSeek-V3.2, V4, GLM-5).

    Attributes:
        tokens_per_slot: 1 where tokens are picked; more where a slot is an entry of so many
            compressed tokens.
        slots: those picked, in order.
        past: how many there were to pick from.
    """

    tokens_per_slot: int
    slots: list[int]
    past: int


@dataclass(frozen=True)
class AttentionDetail:
    """What the token looks back at in one layer.

    Attributes:
        heads: `[head][place]`: probabilities of the text's tokens.
        mean: of the heads.
        entries: of the heads, for entries of compressed tokens (DeepSeek-V4); empty without such.
        tokens_per_entry: how many tokens an entry was compressed from; 0 without such.
        seen: None without an indexer.
        sink_share: what of its attention goes to learned sinks, mean of the heads; None without
            sinks. With the tokens' and the entries' it adds up to one.
    """

    heads: list[list[float]]
    mean: list[float]
    entries: list[float]
    tokens_per_entry: int
    seen: Seen | None
    sink_share: float | None


@dataclass(frozen=True)
class TokenMixing:
    """How half a layer reads, writes and mixes one token's residual streams (DeepSeek-V4's mHC).

    Attributes:
        pre: weight of each stream in what is read.
        post: weight of what is computed in each stream.
        mix: entry `i, j` is the share of the old stream `i` in the new stream `j`.
    """

    pre: list[float]
    post: list[float]
    mix: list[list[float]]


@dataclass(frozen=True)
class RouterDetail:
    """One router's decision about the token; lists run over the layer's routed experts.

    Attributes:
        logits: the router's linear map (after noise).
        scores: after the scoring function.
        bias: the balancing bias, with the reader's own added.
        choice_scores: what the choice went by; None for experts that were ruled out (switched
            off, outside the chosen groups, or not chosen by a rule without a fixed number).
        threshold: the lowest choice score that was chosen.
        topk_ids, topk_weights: the chosen, the heaviest first.
        by_table: whether a fixed table chose by the token's id, whatever the scores.
    """

    logits: list[float]
    scores: list[float]
    bias: list[float]
    choice_scores: list[float | None]
    threshold: float
    topk_ids: list[int]
    topk_weights: list[float]
    by_table: bool


@dataclass(frozen=True)
class Contribution:
    """One summand of the layer's output: a routed expert, or all shared ones (`expert` None).

    Attributes:
        weight: what its output was multiplied by (1 for the shared experts).
        norm: length of the weighted output.
        projection: its part along the direction of the whole sum; these add up to the length of
            the sum.
    """

    expert: int | None
    weight: float
    norm: float
    projection: float


@dataclass(frozen=True)
class MergeDetail:
    """How the layer's output came together.

    Attributes:
        contributions: the routed experts' first, the heaviest first, then the shared ones'.
        output_norm: length of their sum.
        residual_norm_before, residual_norm_after: length of the residual stream without and with
            that sum; None where the residual has several streams.
    """

    contributions: list[Contribution]
    output_norm: float
    residual_norm_before: float | None
    residual_norm_after: float | None


@dataclass(frozen=True)
class PickCandidate:
    """A guess with its logit, and its probability before and after temperature and filters."""

    id: int
    text: str
    probability: float
    logit: float
    filtered_probability: float


@dataclass(frozen=True)
class TokenDetail:
    """Everything about one token in one layer.

    Attributes:
        embedding: the token's vector, `(hidden,)`.
        neighbours: tokens with the most similar embeddings.
        hidden_norms: length of the residual stream: embedding, then after each layer.
        attention: in this layer.
        router, merge: None in a dense layer.
        mixing: of the attention and of the feed-forward half; None with a single residual stream.
        lens: the likeliest next tokens read off after each layer.
        candidates: what comes after this token, likeliest first.
        picked: what greedy choice, or the seed's first draw, picks from them.
    """

    embedding: list[float]
    neighbours: list[Neighbour]
    hidden_norms: list[float]
    attention: AttentionDetail
    router: RouterDetail | None
    merge: MergeDetail | None
    mixing: tuple[TokenMixing, TokenMixing] | None
    lens: list[list[Candidate]]
    candidates: list[PickCandidate]
    picked: int


@dataclass(frozen=True)
class ExpertDetail:
    """One expert at work on a token: `down(silu(gate) * up)`.

    Attributes:
        gate, up, activated: `(moe_intermediate_size,)`.
        output: `(hidden,)`, before the routing weight.
    """

    gate: list[float]
    up: list[float]
    activated: list[float]
    output: list[float]


class Reading:
    """A forward pass over a text, kept for questions about its tokens.

    Args:
        engine: of the model that reads.
        ids: the text.
        parts: in which it is computed.
        begun: a reading, by the same engine, of what the text begins with, which need not be read
            again; it answers on, but can begin no other text.

    Raises:
        UserError: the ids are no text for the model.
    """

    @torch.inference_mode()
    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        parts: Parts = WHOLE,
        begun: "Reading | None" = None,
    ) -> None:
        engine.check(ids)
        self.model: CausalLM = engine.model
        self.tokenizer = engine.tokenizer
        self.ids = list(ids)
        self._input_ids = torch.tensor([self.ids], device=engine.device)  # (1, tokens)
        self._parts = parts
        self._cache: Cache | None = Cache()
        if begun is None or not begun.begins(ids):
            self._seen = TraceRecorder.join(self._read(0))
        else:
            self._cache, begun._cache = begun._cache, None
            self._seen = TraceRecorder.join([begun._seen, *self._read(len(begun.ids))])

    def _read(self, known: int) -> list[TraceRecorder]:
        """Run all layers over what follows so many tokens, in parts."""
        positions = torch.arange(len(self.ids), device=self._input_ids.device)[None]
        seen: list[TraceRecorder] = []
        at_once = self._parts.tokens or len(self.ids)
        for start in range(known, len(self.ids), at_once):
            part = slice(start, start + at_once)
            seen.append(TraceRecorder())
            self.model.model(self._input_ids[:, part], positions[:, part], self._cache, seen[-1])
            self._parts.pause()
        return seen

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether a text can go on from here: it begins so, and no other has gone on yet."""
        known = len(self.ids)
        return self._cache is not None and len(ids) > known and list(ids[:known]) == self.ids

    # --- questions --------------------------------------------------------------------------------

    def steps(self) -> list[TokenStep]:
        """Describe all tokens, as `steps.read` does."""
        return describe(self.model, self.tokenizer, self._seen, self.ids, self._parts)

    @torch.inference_mode()
    def token(self, index: int, layer_idx: int, params: SamplingParams) -> TokenDetail:
        """Take apart what layer `layer_idx` made of token `index`, and what may follow it.

        Raises:
            UserError: there is no such token or layer.
        """
        self._check(index, layer_idx)
        again = attend_again(self.model, self._input_ids, self._seen, layer_idx)
        streams = [self._seen.embedded, *self._seen.hidden_states.values()]
        states = torch.stack([stream[index] for stream in streams])  # (1 + layers, hidden)
        logits = self.model.logits(self.model.model.norm(states[1:]))  # (layers, vocab)
        candidates, picked = self._pick(logits[-1], index, params)
        return TokenDetail(
            embedding=states[0].tolist(),
            neighbours=neighbours(self.model.model.embed_tokens, self.tokenizer, self.ids[index]),
            hidden_norms=states.float().norm(dim=-1).tolist(),
            attention=self._attention(index, layer_idx, again),
            router=self._router(index, layer_idx),
            merge=self._merge(index, layer_idx, again.given[index]),
            mixing=self._mixing(index, layer_idx),
            lens=[self._likeliest(row) for row in logits],
            candidates=candidates,
            picked=picked,
        )

    @torch.inference_mode()
    def expert(self, index: int, layer_idx: int, expert: int) -> ExpertDetail:
        """Show an expert at work on token `index`, whether it was chosen for it or not.

        Raises:
            UserError: there is no such token, layer or expert, or its weights are packed.
        """
        self._check(index, layer_idx)
        moe = moe_layers(self.model).get(layer_idx)
        if moe is None:
            raise UserError(
                f"layer {layer_idx} is dense; it has no routed experts",
                "dense_layer",
                layer=layer_idx,
            )
        experts = moe.experts
        last = experts.gate_up_proj.shape[0] - 1
        if not 0 <= expert <= last:
            raise UserError(
                f"there is no expert {expert}; layer {layer_idx} has experts 0 to {last}",
                "no_expert",
                layer=layer_idx,
                expert=expert,
                last=last,
            )
        if isinstance(experts, NativeExperts):
            raise UserError(
                "packed experts cannot be looked into; open the model unquantized", "packed"
            )
        attended = attend_again(self.model, self._input_ids, self._seen, layer_idx).given
        given = self._normed(layer_idx, attended[index])  # (hidden,)
        first, second = (
            None if bias is None else bias[expert]
            for bias in (experts.gate_up_proj_bias, experts.down_proj_bias)
        )
        gate, up = F.linear(given, experts.gate_up_proj[expert], first).chunk(2)
        activated = experts.activation(gate, up)
        output = F.linear(activated, experts.down_proj[expert], second)
        return ExpertDetail(gate.tolist(), up.tolist(), activated.tolist(), output.tolist())

    def _check(self, index: int, layer_idx: int) -> None:
        if not 0 <= index < len(self.ids):
            raise UserError(f"there is no token {index}; the text has 0 to {len(self.ids) - 1}")
        layers = self.model.config.num_hidden_layers
        if not 0 <= layer_idx < layers:
            raise UserError(f"there is no layer {layer_idx}; the model has 0 to {layers - 1}")

    # --- one layer --------------------------------------------------------------------------------

    def _attention(self, index: int, layer_idx: int, again: Attended) -> AttentionDetail:
        """What `again` tells of one token's attention."""
        heads = again.probabilities[:, index, : index + 1]  # (heads, tokens so far)
        picks, sinks = self._seen.picked.get(layer_idx), self._seen.sink_shares.get(layer_idx)
        seen = None
        if picks is not None:
            past = (index + 1) // picks.tokens_per_slot
            seen = Seen(picks.tokens_per_slot, picks.slots[index], past)
        entries = again.entries[:, index].mean(dim=0) if again.entries is not None else None
        return AttentionDetail(
            heads=heads.tolist(),
            mean=heads.mean(dim=0).tolist(),
            entries=[] if entries is None else entries.tolist(),
            tokens_per_entry=again.tokens_per_entry,
            seen=seen,
            sink_share=None if sinks is None else sinks[index],
        )

    def _mixing(self, index: int, layer_idx: int) -> tuple[TokenMixing, TokenMixing] | None:
        halves = self._seen.mixings.get(layer_idx)
        if halves is None:
            return None
        first, second = (
            TokenMixing(half.pre[index], half.post[index], half.mix[index])
            for half in (halves["attention"], halves["feed_forward"])
        )
        return first, second

    def _normed(self, layer_idx: int, attended: Tensor) -> Tensor:
        """What the feed-forward part of a layer is given, `(..., hidden)`."""
        return self._layer(layer_idx).post_attention_layernorm(attended)

    def _layer(self, layer_idx: int) -> DecoderLayer:
        return cast(DecoderLayer, self.model.model.layers[layer_idx])

    def _chosen(self, index: int, layer_idx: int) -> tuple[list[int], list[float]]:
        """The experts of a token and their weights, the heaviest first."""
        topk_ids, topk_weights = chosen(self._seen.routings[layer_idx])
        return topk_ids[index], topk_weights[index]

    def _router(self, index: int, layer_idx: int) -> RouterDetail | None:
        routing = self._seen.routings.get(layer_idx)
        if routing is None:
            return None
        gate = moe_layers(self.model)[layer_idx].gate
        if not isinstance(gate, SteeredRouter):
            gate = SteeredRouter(self.model.config, gate, layer_idx, Steering())
        choice_scores = gate.choice_scores(
            routing.scores, routing.router_logits, self._input_ids[0]
        )[index]  # (experts,)
        topk_ids, topk_weights = self._chosen(index, layer_idx)
        taken = choice_scores[topk_ids]
        taken = taken[taken > -torch.inf]
        return RouterDetail(
            logits=routing.router_logits[index].tolist(),
            scores=routing.scores[index].tolist(),
            bias=gate.choice_bias.tolist(),
            choice_scores=[s if s > -torch.inf else None for s in choice_scores.tolist()],
            threshold=float(taken.min()) if taken.numel() else 0.0,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            by_table=routing.by_table,
        )

    def _merge(self, index: int, layer_idx: int, attended: Tensor) -> MergeDetail | None:
        """Sum again what the experts of a token returned; `attended` is `(hidden,)`."""
        moe = moe_layers(self.model).get(layer_idx)
        if moe is None:
            return None
        given = self._normed(layer_idx, attended)
        ids, weights = self._chosen(index, layer_idx)
        outputs = [*_weighted_outputs(moe, given, ids, weights)] if ids else []
        owners: list[tuple[int | None, float]] = [*zip(ids, weights, strict=True)]
        if moe.shared_experts is not None:
            outputs.append(moe.shared_experts(given[None])[0])
            owners.append((None, 1.0))
        if not outputs:  # a ReLU router may choose nobody
            outputs.append(torch.zeros_like(given))
            owners.append((None, 0.0))
        parts = torch.stack(outputs).float()  # (summands, hidden)
        whole = parts.sum(dim=0)
        projections = parts @ (whole / whole.norm().clamp(min=1e-30))
        norms = parts.norm(dim=-1)
        single = self.model.config.hc_mult is None
        after = self._seen.hidden_states[layer_idx][index]
        return MergeDetail(
            contributions=[
                Contribution(expert, weight, norm, projection)
                for (expert, weight), norm, projection in zip(
                    owners, norms.tolist(), projections.tolist(), strict=True
                )
            ],
            output_norm=float(whole.norm()),
            residual_norm_before=float(attended.float().norm()) if single else None,
            residual_norm_after=float(after.float().norm()) if single else None,
        )

    # --- what may follow --------------------------------------------------------------------------

    def _pick(
        self, logits: Tensor, index: int, params: SamplingParams
    ) -> tuple[list[PickCandidate], int]:
        """The likeliest of `(vocab,)` logits, and which token is picked."""
        logits = logits.cpu()
        probabilities = logits.softmax(dim=-1)
        scores = penalised(logits, self.ids[: index + 1], 0, params)
        filtered = distribution(scores, params)
        drawn = draw(torch.Generator().manual_seed(params.seed or 0))
        picked = choose(scores, params, drawn)
        best = logits.topk(min(CANDIDATES, logits.shape[-1])).indices.tolist()
        candidates = [
            PickCandidate(
                id=token_id,
                text=legible(self.tokenizer, token_id),
                probability=float(probabilities[token_id]),
                logit=float(logits[token_id]),
                filtered_probability=float(filtered[token_id]),
            )
            for token_id in best
        ]
        return candidates, picked

    def _likeliest(self, logits: Tensor) -> list[Candidate]:
        best = logits.softmax(dim=-1).topk(min(LENS_CANDIDATES, logits.shape[-1]))
        return [
            Candidate(token_id, legible(self.tokenizer, token_id), probability)
            for token_id, probability in zip(
                best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]


def _weighted_outputs(moe: MoE, given: Tensor, ids: list[int], weights: list[float]) -> Tensor:
    """What each of the experts adds for one token `(hidden,)`: `(experts asked, hidden)`."""
    topk_ids = torch.tensor(ids, device=given.device)[:, None]  # (experts asked, 1)
    topk_weights = torch.tensor(weights, device=given.device)[:, None]
    return moe.experts(given.expand(len(ids), -1), topk_ids, topk_weights)
