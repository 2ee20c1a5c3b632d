"""Which experts served an answer's tokens, as JSON: by vLLM's names, and as a trace.

All are `[tokens, layers, slots]`: layers are those with routers, an empty slot is -1.
"""

from collections.abc import Sequence
from typing import Any

from moescope.engine.sequence import RoutedTokens, Token
from moescope.server.openai_schema import Request

Json = dict[str, Any]


def experts_told(asked: Request, tokens: Sequence[Token]) -> Json:
    """Tell of the tokens that were read for tokens of one text, as its choice holds it.

    `routed_experts` are of made tokens, but the last, which is read no more; `moe_trace` is of all.
    """
    parts = [token.routed for token in tokens if token.routed is not None]
    told: Json = {}
    if parts and asked.return_routed_experts:
        made = [part for part in parts if part.start > 0]
        told["routed_experts"] = RoutedTokens.join(made).ids.tolist() if made else []
    if parts and asked.moe_trace:
        told["moe_trace"] = _trace(RoutedTokens.join(parts))
    return told


def prompt_experts(asked: Request, tokens: Sequence[Token]) -> Json:
    """Tell of a prompt, if it is asked for and the first token of a text is among `tokens`."""
    parts = [token.routed for token in tokens if token.routed and token.routed.start == 0]
    if not parts or not asked.return_routed_experts:
        return {}
    return {"prompt_routed_experts": parts[0].ids.tolist()}


def _trace(routed: RoutedTokens) -> Json:
    return {
        "start": routed.start,
        "layers": list(routed.layers),
        "experts": routed.ids.tolist(),
        "weights": routed.weights.tolist(),
        "scores": routed.scores.tolist(),
    }
