"""Which experts served an answer's tokens, as JSON: by vLLM's names, and as a trace."""

from collections.abc import Sequence
from typing import Any

from moescope.engine.sequence import RoutedTokens, Token
from moescope.server.openai_schema import Request

Json = dict[str, Any]
Ids = list[list[list[int]]]
"""`[tokens, layers, slots]`: layers are those with routers; -1 in a slot without an expert."""


def experts_told(asked: Request, tokens: Sequence[Token]) -> tuple[Json, Ids | None]:
    """Tell of the tokens that were read for tokens of one text.

    Returns:
        What its choice holds: `routed_experts` of made tokens, but the last, which is read no more,
        and `moe_trace` of all; and the experts of the prompt, where the first token is among
        `tokens` and they are asked for.
    """
    parts = [token.routed for token in tokens if token.routed is not None]
    if not parts:
        return {}, None
    told: Json = {}
    prompt: Ids | None = None
    if asked.return_routed_experts:
        made = [part for part in parts if part.start > 0]
        told["routed_experts"] = RoutedTokens.join(made).ids.tolist() if made else []
        prompt = parts[0].ids.tolist() if parts[0].start == 0 else None
    if asked.moe_trace:
        told["moe_trace"] = _trace(RoutedTokens.join(parts))
    return told, prompt


def _trace(routed: RoutedTokens) -> Json:
    return {
        "start": routed.start,
        "layers": list(routed.layers),
        "experts": routed.ids.tolist(),
        "weights": routed.weights.tolist(),
        "scores": routed.scores.tolist(),
    }
