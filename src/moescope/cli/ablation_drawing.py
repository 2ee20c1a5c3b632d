"""An ablation drawn in the terminal: a map of each layer, and the experts that are missed most."""

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from moescope.cli.drawing import WIDEST, is_chinese
from moescope.cli.maps import draw_map, named
from moescope.scope.ablation import Ablation

MISSED = 3
"""Experts that are shown for each domain."""


@dataclass(frozen=True)
class Labels:
    """Everything that is said, in one language."""

    off: str
    forced: str
    legend: str
    layer: str
    missed: str
    expert: str


ENGLISH = Labels(
    off="{name}: what each of {experts} experts does that its replacement does not; "
    "{tokens:,} tokens in {documents:,} documents.",
    forced="{name}: what it costs to send every token to one of {experts} experts; "
    "{tokens:,} tokens in {documents:,} documents.",
    legend="By how much the loss of a domain rises: one column an expert",
    layer="layer {layer}: a full cell is +{most:.2g} nats a token; {certain} of {all} rises are "
    "certain (95 %)",
    missed="The experts that cost each domain most, in nats a token",
    expert="layer {layer} expert {expert}: {cost:+.3g} [{low:+.3g}, {high:+.3g}] of {loss:.2f}",
)
CHINESE = Labels(
    off="{name}：逐一关闭 {experts} 个专家，改由次优专家接替；{documents:,} 篇文本，"
    "{tokens:,} 个词元。",
    forced="{name}：逐一强制所有词元使用 {experts} 个专家之一；{documents:,} 篇文本，"
    "{tokens:,} 个词元。",
    legend="各领域的损失上升多少：一列一个专家",
    layer="层 {layer}：满格为每词元 +{most:.2g} 奈特；{all} 项上升中 {certain} 项可信（95 %）",
    missed="对各领域影响最大的专家（奈特/词元）",
    expert="层 {layer} 专家 {expert}：{cost:+.3g} [{low:+.3g}, {high:+.3g}]，原为 {loss:.2f}",
)


def draw(found: Ablation, console: Console) -> None:
    """Print the map of every layer, then the experts that are missed most.

    Labels are Chinese where a domain's name is.
    """
    labels = CHINESE if is_chinese("".join(found.domains)) else ENGLISH
    width = min(console.width, WIDEST)
    summary = (labels.forced if found.forced else labels.off).format(
        name=found.model,
        experts=len(found.layers) * len(found.cost[0][0]),
        tokens=sum(found.tokens),
        documents=sum(found.documents),
    )
    console.print()
    console.print(Text(summary), width=width)
    console.print(Text(labels.legend, style="bold"), width=width)
    for position in range(len(found.layers)):
        _draw_layer(found, position, labels, console, width)
    console.print()
    console.print(Text(labels.missed, style="bold"), width=width)
    for domain in range(len(found.domains)):
        _draw_missed(found, domain, labels, console, width)


def _draw_layer(
    found: Ablation, position: int, labels: Labels, console: Console, width: int
) -> None:
    costs = {
        name: by_layer[position] for name, by_layer in zip(found.domains, found.cost, strict=True)
    }
    lows = [low for by_layer in found.low for low in by_layer[position]]
    most = max(1e-12, *(max(row) for row in costs.values()))
    title = labels.layer.format(
        layer=found.layers[position] + 1,
        most=most,
        certain=sum(low > 0 for low in lows),
        all=len(lows),
    )
    console.print()
    console.print(Text(title), width=width)
    draw_map({name: [cost / most for cost in row] for name, row in costs.items()}, console, width)


def _draw_missed(
    found: Ablation, domain: int, labels: Labels, console: Console, width: int
) -> None:
    places = [
        (position, expert)
        for position, costs in enumerate(found.cost[domain])
        for expert in range(len(costs))
    ]
    places.sort(key=lambda place: -found.cost[domain][place[0]][place[1]])
    for number, (position, expert) in enumerate(places[:MISSED]):
        told = labels.expert.format(
            layer=found.layers[position] + 1,
            expert=expert,
            cost=found.cost[domain][position][expert],
            low=found.low[domain][position][expert],
            high=found.high[domain][position][expert],
            loss=found.loss[domain],
        )
        line = named("" if number else found.domains[domain]) + told
        console.print(Text(line), width=width, no_wrap=True)
