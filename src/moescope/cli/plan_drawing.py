"""A plan as tables in the terminal: 80 columns are enough."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moescope.config import ModelConfig
from moescope.lab.cluster import H800, Placement
from moescope.lab.plan import Fit, Plan
from moescope.lab.speed import Prediction
from moescope.lab.stored import Stored
from moescope.lab.units import of_bytes, of_flops, of_parameters

WIDEST = 80
FORMATS = {"stored": "as stored", "bf16": "bf16", "int8": "int8, fp8", "int4": "int4"}
LEGEND = "int4: all weights at 4.5 bits; cache: keys and values of one token, in bf16"
PLACEMENTS_LEGEND = (
    "state: weights, gradients and moments (float32, AdamW) of a GPU, without activations; *: more "
    "than its memory. nodes: that a token visits in a layer. Then bytes for each token: to experts "
    "and back, to gather weights and sum gradients, and what of both goes between nodes. hours: of "
    "all GPUs together, if products and wire never waited for each other, and if they always did, "
    f"each at its full rate ({of_flops(int(H800.flops))}/s in bf16, {of_bytes(int(H800.link))}/s "
    f"within a node of {H800.per_node}, {of_bytes(int(H800.network))}/s between nodes)"
)
SPEED_LEGEND = (
    "tokens a second, predicted from a few layers of this shape with random weights; limits: if "
    "nothing but memory, or products, took time"
)
PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "dense_mlp": "dense feed-forward",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "routers",
    "norm": "norms",
    "lm_head": "output head",
    "total": "total",
    "active": "active for a token",
    "active_without_embedding": "  without its embedding",
    "mtp": "multi-token prediction, apart",
}


def draw_overview(plans: Sequence[Plan], console: Console) -> None:
    """Print one line a model."""
    table = _table("model", "total", "active", "share", "int4", "cache")
    for plan in plans:
        parameters = plan.parameters
        table.add_row(
            plan.name,
            of_parameters(parameters.total),
            of_parameters(parameters.active),
            f"{parameters.active / parameters.total:.1%}",
            of_bytes(plan.weights.int4),
            of_bytes(plan.cache.bytes_per_token),
        )
    width = min(console.width, WIDEST)
    console.print(table, width=width)
    console.print(Text(LEGEND, style="dim"), width=width)


def draw(plan: Plan, console: Console) -> None:
    """Print the shape, the parameters, what fits into this machine, and the work of a token."""
    width = min(console.width, WIDEST)
    title = [Text(plan.source, style="bold")]
    if not plan.source.startswith(plan.name):  # as a path, which names the model already
        title = [Text(plan.name, style="bold"), Text(plan.source, style="dim")]
    console.print(*title, width=width)
    console.print(_shape(plan.config), width=width)
    console.print()
    console.print(_parameters(plan), width=width)
    if plan.stored is not None:
        console.print()
        console.print(_stored(plan.stored), width=width)
    for place in dict.fromkeys(fit.place for fit in plan.fits):
        fits = [fit for fit in plan.fits if fit.place == place]
        console.print()
        console.print(Text(f"{place}: {of_bytes(fits[0].room)} of room", style="bold"), width=width)
        console.print(_fits(plan, fits), width=width)
    console.print()
    console.print(_work(plan), width=width)
    if plan.speed is not None:
        console.print()
        console.print(Text(_probed(plan.speed), style="bold"), width=width)
        console.print(_speeds(plan.speed), width=width)
        console.print(Text(SPEED_LEGEND, style="dim"), width=width)


def draw_placements(placements: Sequence[Placement], tokens: float, console: Console) -> None:
    """Print what each way to deal a training of so many trillions of tokens sends and takes."""
    table = _table("data x expert", "state", "nodes", "experts", "weights", "network", "hours")
    for one in placements:
        hours = (one.overlapped_hours / 1e6, one.separate_hours / 1e6)
        table.add_row(
            f"{one.data:,} x {one.expert}",
            of_bytes(one.state_bytes) + (" " if one.fits else "*"),
            f"{one.nodes_per_token:.1f}",
            *(of_bytes(round(b)) for b in (one.expert_bytes, one.data_bytes, one.network_bytes)),
            " - ".join(f"{million:.3g}M" for million in hours),
        )
    width = min(console.width, WIDEST)
    console.print()
    console.print(Text(f"training on {tokens:g}T tokens, on {H800.name}", style="bold"))
    console.print(table, width=width)
    console.print(Text(PLACEMENTS_LEGEND, style="dim"), width=width)


def _shape(config: ModelConfig) -> Text:
    layers = config.num_hidden_layers
    attention = "latent" if config.uses_mla else "grouped-query"
    if config.n_routed_experts is None:
        return Text(f"{layers} layers, {attention} attention, no experts.")
    with_experts = sum(config.is_moe_layer(layer_idx) for layer_idx in range(layers))
    shared = f" and {config.n_shared_experts} shared" if config.n_shared_experts else ""
    return Text(
        f"{layers} layers, {attention} attention; {with_experts} send a token to "
        f"{config.num_experts_per_tok} of {config.n_routed_experts} experts{shared}."
    )


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "count", "of all")
    for part, count in dataclasses.asdict(plan.parameters).items():
        if part not in ("total", "active", "active_without_embedding", "mtp") and count:
            table.add_row(PARTS[part], of_parameters(count), f"{count / plan.parameters.total:.2%}")
    for part in ("total", "active", "active_without_embedding", "mtp"):
        if count := getattr(plan.parameters, part):
            share = f"{count / plan.parameters.total:.2%}"
            table.add_row(PARTS[part], of_parameters(count), "" if part == "mtp" else share)
    return table


def _stored(stored: Stored) -> Table:
    table = _table("stored", "bytes")
    table.add_column("types", overflow="fold")
    for part in PARTS:
        if part in stored.parts:
            kinds = stored.parts[part]
            table.add_row(PARTS[part], of_bytes(sum(kinds.values())), _shares(kinds))
    table.add_row("total", of_bytes(stored.bytes), _shares(stored.kinds))
    return table


def _shares(kinds: dict[str, int]) -> str:
    """Name types and their shares of the bytes: `Q4_K 60.2 %, Q6_K 39.8 %`."""
    total = sum(kinds.values())
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(
        f"{kind} {size / total:.1%}".replace("%", " %") for kind, size in kinds.items()
    )


def _fits(plan: Plan, fits: Sequence[Fit]) -> Table:
    table = _table(
        "format",
        "weights",
        f"and cache of {plan.work.context:,}",
        "fits",
        "longest context",
        "read/token",
    )
    for fit in fits:
        table.add_row(
            FORMATS[fit.format],
            of_bytes(plan.weights_in(fit.format)),
            of_bytes(fit.needed),
            "yes" if fit.fits else "no",
            f"{fit.longest_context:,}" if fit.longest_context else "-",
            of_bytes(plan.bytes_read_in(fit.format)),
        )
    return table


def _work(plan: Plan) -> Table:
    cache, work = plan.cache, plan.work
    rows = {
        "cache": f"{of_bytes(cache.bytes_per_token)} a token, "
        f"{of_bytes(cache.bytes_at_max_context)} for all {cache.max_context:,}; plain attention: "
        f"{of_bytes(cache.plain_bytes_per_token)} a token; beside int8 or int4 weights moescope "
        f"keeps {of_bytes(cache.engine_bytes_per_token['int8'])} a token",
        "reading": f"{of_flops(work.reading_flops)} a token of a prompt of {work.context:,}, "
        f"attention {of_flops(work.reading_attention_flops)}",
        "writing": f"{of_flops(work.generating_flops)} a token after {work.context:,}, "
        f"attention {of_flops(work.generating_attention_flops)}",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for title, value in rows.items():
        table.add_row(title, value)
    return table


def _probed(speed: Prediction) -> str:
    peaks = ", ".join(f"{name} {of_flops(int(peak))}/s" for name, peak in speed.gemm_peak.items())
    return (
        f"speed here, on {speed.threads} threads, with {speed.prompt:,} tokens before: memory "
        f"{of_bytes(int(speed.read_bandwidth))}/s; products: {peaks}"
    )


def _speeds(speed: Prediction) -> Table:
    table = _table("format", "writing", "memory's limit", "reading", "products' limit")
    for one in speed.speeds:
        rates = (one.decode, one.decode_limit, one.prefill, one.prefill_limit)
        table.add_row(one.format, *(f"{rate:,.{0 if rate >= 100 else 1}f}" for rate in rates))
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
