"""Run a text through a model with a recorder, and write down what it saw."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from moescope.model.decoder import CausalLM
from moescope.model.moe import MoE
from moescope.model.recorder import Recorder
from moescope.model.routing import UNUSED, Routing
from moescope.scope.bytes import WeightBytes
from moescope.scope.trace import (
    Candidate,
    LayerTrace,
    Mixing,
    Picks,
    RouterTrace,
    Trace,
    TracedToken,
)
from moescope.text.tokenizer import Tokenizer

GUESSES = 5
TOKENS_AT_ONCE = 256
"""Logits over the vocabulary are made for this many tokens at a time."""


@torch.inference_mode()
def record(
    name: str,
    model: CausalLM,
    tokenizer: Tokenizer,
    input_ids: Sequence[int],
    prompt_tokens: int,
    attention: bool = False,
) -> Trace:
    """Trace `input_ids`, of which the first `prompt_tokens` are the prompt's."""
    recorder = TraceRecorder(wants_attention=attention)
    ids = torch.tensor([list(input_ids)], device=model.lm_head.weight.device)
    model(ids, recorder=recorder)
    guess = _Guesser(model, tokenizer)
    layers = [
        LayerTrace(
            router=_router_trace(recorder, layer_idx),
            hidden_norm=_lengths(hidden_states),
            guesses=guess(hidden_states),
            attention=_listed(recorder.attentions.get(layer_idx)),
            entry_attention=_listed(recorder.entry_attentions.get(layer_idx)),
            picks=recorder.picked.get(layer_idx),
            sink_share=recorder.sink_shares.get(layer_idx),
            mixing=_both(recorder.mixings.get(layer_idx)),
        )
        for layer_idx, hidden_states in recorder.hidden_states.items()
    ]
    used = parameters_used(model, recorder.routings, len(input_ids))
    read = WeightBytes.of(model).read(recorder.routings, len(input_ids))
    tokens = [
        TracedToken(
            token_id, tokenizer.decode([token_id], skip_special_tokens=False), parameters, size
        )
        for token_id, parameters, size in zip(input_ids, used.tolist(), read.tolist(), strict=True)
    ]
    return Trace(
        model=name,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        total_parameters=total_parameters(model),
        embedding_norm=_lengths(recorder.embedded),
        layers=layers,
        guesses=layers[-1].guesses,
    )


class TraceRecorder(Recorder):
    """Keeps what the last forward pass over one sequence handed it."""

    def __init__(self, *, wants_attention: bool = False) -> None:
        self.wants_attention = wants_attention
        self.embedded = torch.empty(0)  # (tokens, hidden)
        self.hidden_states: dict[int, Tensor] = {}  # after a layer: (tokens, hidden)
        self.routings: dict[int, Routing] = {}
        self.outputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.attentions: dict[int, Tensor] = {}  # a layer: (heads, tokens, tokens)
        self.entry_attentions: dict[int, Tensor] = {}  # a layer: (heads, tokens, entries)
        self.picked: dict[int, Picks] = {}
        self.sink_shares: dict[int, list[float]] = {}
        self.mixings: dict[int, dict[str, Mixing]] = {}  # a layer: its halves

    @classmethod
    def join(cls, parts: Sequence["TraceRecorder"]) -> "TraceRecorder":
        """Return what one pass would have shown, of passes over the parts of a text in order.

        Attention, whose slots grow from part to part, is left out.
        """
        if len(parts) == 1:
            return parts[0]
        joined, first = cls(), parts[0]
        joined.embedded = torch.cat([part.embedded for part in parts])
        for layer_idx in first.hidden_states:
            states = [part.hidden_states[layer_idx] for part in parts]
            joined.hidden_states[layer_idx] = torch.cat(states)
        for layer_idx in first.routings:
            joined.routings[layer_idx] = Routing.join([part.routings[layer_idx] for part in parts])
        for layer_idx in first.outputs:
            routed, shared = zip(*(part.outputs[layer_idx] for part in parts), strict=True)
            made = [one for one in shared if one is not None]
            joined.outputs[layer_idx] = torch.cat(routed), torch.cat(made) if made else None
        for layer_idx, picks in first.picked.items():
            slots = [row for part in parts for row in part.picked[layer_idx].slots]
            joined.picked[layer_idx] = Picks(picks.tokens_per_slot, slots)
        for layer_idx in first.sink_shares:
            shares = [share for part in parts for share in part.sink_shares[layer_idx]]
            joined.sink_shares[layer_idx] = shares
        for layer_idx, halves in first.mixings.items():
            joined.mixings[layer_idx] = {
                half: Mixing.join([part.mixings[layer_idx][half] for part in parts])
                for half in halves
            }
        return joined

    def embedding(self, hidden_states: Tensor) -> None:
        self.embedded = hidden_states[0]

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        self.attentions[layer_idx] = probabilities[0]

    def entry_attention(self, layer_idx: int, probabilities: Tensor, tokens_per_slot: int) -> None:
        self.entry_attentions[layer_idx] = probabilities[0]

    def picks(self, layer_idx: int, seen: Tensor, tokens_per_slot: int) -> None:
        slots = [row.nonzero().flatten().tolist() for row in seen[0]]
        self.picked[layer_idx] = Picks(tokens_per_slot, slots)

    def sinks(self, layer_idx: int, shares: Tensor) -> None:
        self.sink_shares[layer_idx] = shares[0].mean(dim=0).tolist()

    def mixing(
        self,
        layer_idx: int,
        half: Literal["attention", "feed_forward"],
        pre: Tensor,
        post: Tensor,
        mix: Tensor,
    ) -> None:
        held = Mixing(pre[0].tolist(), post[0].tolist(), mix[0].tolist())
        self.mixings.setdefault(layer_idx, {})[half] = held

    def routing(self, layer_idx: int, routing: Routing) -> None:
        self.routings[layer_idx] = routing

    def experts(self, layer_idx: int, routed_output: Tensor, shared_output: Tensor | None) -> None:
        self.outputs[layer_idx] = routed_output, shared_output

    def layer(self, layer_idx: int, hidden_states: Tensor) -> None:
        self.hidden_states[layer_idx] = hidden_states[0]


class _Guesser:
    """Reads next-token guesses off hidden states with the model's own norm and head."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, hidden_states: Tensor) -> list[list[Candidate]]:
        """Return the likeliest next tokens for each of `(tokens, hidden)`."""
        return [
            [
                Candidate(token_id, self._spell(token_id), probability)
                for token_id, probability in zip(ids, probabilities, strict=True)
            ]
            for chunk in hidden_states.split(TOKENS_AT_ONCE)
            for probabilities, ids in zip(*self._likeliest(chunk), strict=True)
        ]

    def _likeliest(self, hidden_states: Tensor) -> tuple[list[list[float]], list[list[int]]]:
        logits = self.model.logits(self.model.model.norm(hidden_states))  # (tokens, vocab)
        best = logits.softmax(dim=-1).topk(min(GUESSES, logits.shape[-1]))
        return best.values.tolist(), best.indices.tolist()

    def _spell(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


def total_parameters(model: CausalLM) -> int:
    """Count the weights, shared ones once, without the multi-token-prediction module."""
    counted = {id(p): p.numel() for n, p in model.named_parameters() if not n.startswith("mtp.")}
    return sum(counted.values())


def parameters_used(model: CausalLM, routings: dict[int, Routing], tokens: int) -> Tensor:
    """Count the weights that worked on each token, `(tokens,)` int64: all but unchosen experts'."""
    used = torch.full((tokens,), total_parameters(model))
    for layer_idx, routing in routings.items():
        mlp = cast(MoE, model.model.layers[layer_idx].mlp)
        stacked = sum(weight.numel() for weight in mlp.experts.parameters())
        chosen = (routing.topk_ids != UNUSED).sum(dim=-1).cpu()  # (tokens,)
        used += chosen * (stacked // routing.scores.shape[-1]) - stacked
    return used


def _router_trace(recorder: TraceRecorder, layer_idx: int) -> RouterTrace | None:
    routing = recorder.routings.get(layer_idx)
    if routing is None:
        return None
    topk_ids, topk_weights = chosen(routing)
    return RouterTrace(
        scores=routing.scores.tolist(),
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        shared_share=shared_share(*recorder.outputs[layer_idx]),
        by_table=routing.by_table,
    )


def chosen(routing: Routing) -> tuple[list[list[int]], list[list[float]]]:
    """Return each token's experts and their weights, the heaviest first, without unused slots."""
    order = routing.topk_weights.argsort(dim=-1, descending=True, stable=True)  # (tokens, slots)
    ids = routing.topk_ids.gather(1, order).tolist()
    weights = routing.topk_weights.gather(1, order).tolist()
    topk_ids = [[i for i in row if i != UNUSED] for row in ids]
    topk_weights = [
        [w for i, w in zip(row_ids, row, strict=True) if i != UNUSED]
        for row_ids, row in zip(ids, weights, strict=True)
    ]
    return topk_ids, topk_weights


def shared_share(routed_output: Tensor, shared_output: Tensor | None) -> list[float]:
    """Share of the shared experts in the lengths of both outputs `(tokens, hidden)`, per token."""
    if shared_output is None:
        return [0.0] * routed_output.shape[0]
    shared, routed = shared_output.float().norm(dim=-1), routed_output.float().norm(dim=-1)
    return (shared / (shared + routed).clamp(min=1e-30)).tolist()


def _both(halves: dict[str, Mixing] | None) -> tuple[Mixing, Mixing] | None:
    return None if halves is None else (halves["attention"], halves["feed_forward"])


def _lengths(hidden_states: Tensor) -> list[float]:
    return hidden_states.float().norm(dim=-1).tolist()


def _listed(attention: Tensor | None) -> list[list[list[float]]] | None:
    return None if attention is None else attention.tolist()
