"""Draw what each router decides about the same tokens: `python docs/images/routers.py`.

The decisions are those of `moescope.model.routing`; this file only draws them. Rows are tokens,
columns are experts, and a cell is the darker the higher the score. A dot marks a chosen expert, its
area the weight. Bars below count the tokens that came to each expert.
"""

from pathlib import Path

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.model.balancing import update_bias
from moescope.model.routing import ROUTERS, UNUSED, NoAuxTopK, Router, Routing

FOLDER = Path(__file__).parent / "routers"
TOKENS, EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 12, 16, 4, 4, 2
SCORING = {"noaux_tc": "sigmoid", "group_limited_greedy": "softmax"}
TRAINED_IN = ("expert_choice", "sinkhorn")
"""Routers that look at a whole batch in training, which is what is drawn."""

CELL, LEFT, TOP, GAP, BARS = 24, 28, 40, 10, 52
INK, SHADE, DOT, BAR = "#37474f", "#00897b", "#e65100", "#607d8b"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for method in ROUTERS:
        (FOLDER / f"{method}.svg").write_text(picture(method), encoding="utf-8")


def picture(method: str) -> str:
    """Return the SVG of one router's decisions."""
    router, hidden_states = set_up(method)
    ids = torch.arange(TOKENS)
    if isinstance(router, NoAuxTopK):  # what the trainer does after each step, a few hundred times
        for _ in range(400):
            counts = router(hidden_states, ids).expert_counts
            update_bias(router.e_score_correction_bias, counts, 0.002)
    return draw(method, router, router(hidden_states, ids))


def set_up(method: str) -> tuple[Router, Tensor]:
    """Return a router and hidden states `(tokens, hidden)` that are its logits themselves."""
    config = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=TOKENS,
        hidden_size=EXPERTS,
        intermediate_size=EXPERTS,
        moe_intermediate_size=EXPERTS,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=GROUPS if method == "group_limited_greedy" else 1,
        topk_group=TOP_GROUPS if method == "group_limited_greedy" else 1,
        topk_method=method,
        scoring_func=SCORING.get(method, "softmax"),
        norm_topk_prob=method == "noaux_tc",
    )
    router = ROUTERS[method](config).requires_grad_(False).train(method in TRAINED_IN)
    seeded = torch.Generator().manual_seed(7)
    liked = torch.randn(EXPERTS, generator=seeded)  # some experts are liked by most tokens
    hidden_states = (torch.randn(TOKENS, EXPERTS, generator=seeded) + 0.8 * liked).round(decimals=1)
    frozen = torch.randn(EXPERTS, EXPERTS, generator=seeded) / EXPERTS**0.5
    router.weight.copy_(frozen if method == "random" else torch.eye(EXPERTS))
    return router, hidden_states


def draw(method: str, router: Router, routing: Routing) -> str:
    width, height = LEFT + EXPERTS * CELL + GAP, TOP + TOKENS * CELL + 2 * GAP + BARS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10" fill="{INK}" text-anchor="middle">',
        f"<title>{method}: {TOKENS} tokens, {EXPERTS} experts</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
        *(text(x_of(e), TOP - 6, str(e)) for e in range(EXPERTS)),
        *(text(LEFT - 12, y_of(t) + 4, str(t)) for t in range(TOKENS)),
    ]
    for token in range(TOKENS):
        parts += draw_token(token, routing)
    if isinstance(router, NoAuxTopK):
        parts += draw_bias(router.e_score_correction_bias)
    if method == "group_limited_greedy":
        parts += [
            f'<path d="M{LEFT + g * EXPERTS // GROUPS * CELL} {TOP - 16}v{TOKENS * CELL + 16}" '
            f'stroke="{INK}" stroke-width="1.5"/>'
            for g in range(1, GROUPS)
        ]
    return "\n".join([*parts, *draw_load(routing.expert_counts), "</svg>\n"])


def draw_token(token: int, routing: Routing) -> list[str]:
    scores = routing.scores[token]
    shades = scores / scores.max().clamp(min=1e-20)
    parts = [
        f'<rect x="{LEFT + e * CELL + 1}" y="{TOP + token * CELL + 1}" width="{CELL - 2}" '
        f'height="{CELL - 2}" fill="{SHADE}" fill-opacity="{0.04 + 0.5 * shades[e]:.2f}"/>'
        for e in range(EXPERTS)
    ]
    total = routing.topk_weights[token].sum().clamp(min=1e-20)
    for expert, weight in zip(routing.topk_ids[token], routing.topk_weights[token], strict=True):
        if expert != UNUSED:
            radius = 3 + 7 * float(weight / total) ** 0.5
            parts.append(
                f'<circle cx="{x_of(int(expert))}" cy="{y_of(token)}" r="{radius:.1f}" '
                f'fill="{DOT}"/>'
            )
    return parts


def draw_bias(bias: Tensor) -> list[str]:
    """Bars above the columns, upwards where the bias helps an expert."""
    unit = 8 / float(bias.abs().max())
    return [
        f'<rect x="{x_of(e) - 6}" y="{14 - max(0.0, unit * float(b)):.1f}" width="12" '
        f'height="{abs(unit * float(b)):.1f}" fill="{DOT if b > 0 else BAR}"/>'
        for e, b in enumerate(bias)
    ]


def draw_load(counts: Tensor) -> list[str]:
    ground = TOP + TOKENS * CELL + GAP + BARS
    parts: list[str] = []
    for expert, count in enumerate(counts.tolist()):
        tall = count * (BARS - 12) / TOKENS
        parts += [
            f'<rect x="{LEFT + expert * CELL + 3}" y="{ground - tall:.1f}" width="{CELL - 6}" '
            f'height="{tall:.1f}" fill="{BAR}"/>',
            text(x_of(expert), ground - tall - 3, str(count)),
        ]
    return parts


def text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:g}" y="{y:.1f}">{words}</text>'


def x_of(expert: int) -> float:
    return LEFT + (expert + 0.5) * CELL


def y_of(token: int) -> float:
    return TOP + (token + 0.5) * CELL


if __name__ == "__main__":
    main()
