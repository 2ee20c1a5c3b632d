"""A specialization drawn in the terminal: a map of each layer, and the most devoted experts."""

import math
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moescope.cli.drawing import WIDEST, is_chinese, visible
from moescope.cli.maps import draw_map, named
from moescope.scope.cards import cards_of
from moescope.scope.specialization import Specialization

FULLEST = 4.0
"""Times an even share at which a cell is full."""
DEVOTED = 2
"""Experts that are shown for each domain."""


@dataclass(frozen=True)
class Labels:
    """Everything that is said, in one language."""

    summary: str
    summary_of_one: str
    legend: str
    layer: str
    layer_of_one: str
    devoted: str
    expert: str
    cards: str
    card_layer: str


ENGLISH = Labels(
    summary="{name}: {layers} layers of {experts} experts, {tokens:,} tokens in {documents:,} "
    "documents of {domains} domains.",
    summary_of_one="{name}: {layers} layers of {experts} experts, {tokens:,} tokens in "
    "{documents:,} documents of one domain; give a folder with a subfolder for each domain to "
    "see which experts tell them apart.",
    legend="How much of a domain each expert serves: one column an expert, from 0 to {last}; "
    "full at {fullest:g} times an even share",
    layer="layer {layer}: an expert tells {bits:.2f} ± {error:.3f} of {most:.2f} bits about the "
    "domain; the token alone decides {token:.0%} of its experts",
    layer_of_one="layer {layer}: the token alone decides {token:.0%} of its experts",
    devoted="The most devoted experts of each domain, and the tokens they receive",
    expert="layer {layer} expert {expert}: {share:.0%}",
    cards="A card of each expert: its name if its tokens are of one kind, the domain that takes "
    "most of its work, its most typical tokens",
    card_layer="layer {layer}",
)
CHINESE = Labels(
    summary="{name}：{layers} 层，每层 {experts} 个专家；{domains} 个领域的 {documents:,} 篇文本，"
    "共 {tokens:,} 个词元。",
    summary_of_one="{name}：{layers} 层，每层 {experts} 个专家；{documents:,} 篇文本，"
    "共 {tokens:,} 个词元，只有一个领域。想看专家如何区分领域，"
    "请给一个文件夹，其中每个领域一个子文件夹。",
    legend="各专家为各领域出力多少：一列一个专家（0 到 {last}），平均的 {fullest:g} 倍为满格",
    layer="层 {layer}：专家透露领域信息 {bits:.2f} ± {error:.3f} 比特（最多 {most:.2f}）；"
    "词元本身决定 {token:.0%}",
    layer_of_one="层 {layer}：词元本身决定 {token:.0%}",
    devoted="各领域最专一的专家，及其分到的典型词元",
    expert="层 {layer} 专家 {expert}：{share:.0%}",
    cards="每位专家一张卡片：名字（词元属于同一类时才有）、占它工作最多的领域、最典型的词元",
    card_layer="层 {layer}",
)


def draw(found: Specialization, console: Console) -> None:
    """Print the map of every layer, then the most devoted experts with their tokens."""
    labels = CHINESE if _mostly_chinese(found) else ENGLISH
    width = min(console.width, WIDEST)
    experts = len(found.load[0][0])
    told = labels.summary if len(found.domains) > 1 else labels.summary_of_one
    summary = told.format(
        name=found.model,
        layers=len(found.layers),
        experts=experts,
        tokens=sum(found.tokens),
        documents=sum(found.documents),
        domains=len(found.domains),
    )
    console.print()
    console.print(Text(summary), width=width)
    legend = labels.legend.format(last=experts - 1, fullest=FULLEST)
    console.print(Text(legend, style="bold"), width=width)
    for position in range(len(found.layers)):
        _draw_layer(found, position, labels, console, width)
    console.print()
    console.print(Text(labels.devoted, style="bold"), width=width)
    for domain in range(len(found.domains)):
        _draw_devoted(found, domain, labels, console, width)


def draw_cards(found: Specialization, console: Console) -> None:
    """Print a line for each expert of each layer."""
    labels = CHINESE if _mostly_chinese(found) else ENGLISH
    width = min(console.width, WIDEST)
    console.print()
    console.print(Text(labels.cards, style="bold"), width=width)
    for layer, cards in zip(found.layers, cards_of(found), strict=True):
        console.print()
        title = labels.card_layer.format(layer=layer + 1)
        console.print(Text(title, style="bold"), width=width)
        for expert, card in enumerate(cards):
            name = (card.zh if labels is CHINESE else card.en) or ""
            domain = f"{found.domains[card.domain]} {card.domain_share:.0%}"
            line = Text(f"{expert:>4}  ")
            line.append(name + " " * max(1, 21 - cell_len(name)), style="bold")
            line.append(domain + " " * max(1, 18 - cell_len(domain)), style="dim")
            line.append("  ".join(map(visible, card.tokens)))
            line.truncate(width, overflow="ellipsis")
            console.print(line, width=width, no_wrap=True)


def _draw_layer(
    found: Specialization,
    position: int,
    labels: Labels,
    console: Console,
    width: int,
) -> None:
    told = labels.layer if len(found.domains) > 1 else labels.layer_of_one
    title = told.format(
        layer=found.layers[position] + 1,
        bits=found.mutual_information[position],
        error=found.mutual_information_error[position],
        most=math.log2(len(found.domains)),
        token=max(0.0, found.token_share[position]),  # as it is estimated, chance may be below
    )
    console.print()
    console.print(Text(title), width=width)
    even = FULLEST / len(found.load[0][position])
    rows = {
        name: [share / even for share in by_layer[position]]
        for name, by_layer in zip(found.domains, found.load, strict=True)
    }
    draw_map(rows, console, width)


def _draw_devoted(
    found: Specialization, domain: int, labels: Labels, console: Console, width: int
) -> None:
    """One line an expert: how much of its load is the domain's, were domains as frequent."""
    devotion = {
        (position, expert): share / sum(by_layer[position][expert] for by_layer in found.load)
        for position, shares in enumerate(found.load[domain])
        for expert, share in enumerate(shares)
        if share >= 1 / len(shares)
    }
    best = sorted(devotion, key=lambda place: -devotion[place])[:DEVOTED]
    for number, (position, expert) in enumerate(best):
        line = Text(named("" if number else found.domains[domain]))
        told = labels.expert.format(
            layer=found.layers[position] + 1, expert=expert, share=devotion[position, expert]
        )
        line.append(told + " " * max(1, 26 - cell_len(told)), style="dim")
        line.append("  ".join(visible(token.text) for token in found.typical[position][expert]))
        line.truncate(width, overflow="ellipsis")
        console.print(line, width=width, no_wrap=True)


def _mostly_chinese(found: Specialization) -> bool:
    """Whether more of the experts' tokens are Chinese than Latin."""
    texts = [token.text for layer in found.typical for expert in layer for token in expert]
    latin = sum(any(c.isascii() and c.isalpha() for c in text) for text in texts)
    return sum(map(is_chinese, texts)) > latin
