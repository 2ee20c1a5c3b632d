"""A trace drawn in the terminal: 80 columns are enough, and nothing is told by colour alone."""

import colorsys
import re
import unicodedata
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moescope.scope.trace import Candidate, LayerTrace, Trace
from moescope.text.tokenizer import Tokenizer

WIDEST = 80
BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = " .:-=+*#@"
MOST_LAYERS = 6
"""Layers whose experts fit beside a token; of deeper models the last ones are shown."""
SPECIAL = re.compile(r"<[|｜](\w+?)(?:▁.*|[|｜].*)?[|｜]?>")
GOLDEN = 0.618034  # steps of this share of the circle keep neighbouring experts' hues apart


@dataclass(frozen=True)
class Labels:
    """Everything that is said, in one language."""

    summary: str
    dense_summary: str
    paths: str
    token: str
    layer: str
    column: str
    parameters: str
    shared: str
    next_token: str
    load: str
    no_load: str
    lens: str
    continuation: str
    parts: str
    by_table: str
    picks: str
    entry_picks: str
    sinks: str
    streams: str


ENGLISH = Labels(
    summary="{name}: {total} parameters. Each layer with experts sends a token to {k} of {n}, "
    "so {used} ({share:.0%}) work on it.",
    dense_summary="{name}: {total} parameters, and every one works on every token.",
    paths="Each token's leading expert, layer by layer (+ marks the continuation)",
    token="token",
    layer="layer",
    column="L{at}",
    parameters="used",
    shared="shared",
    next_token="next",
    load="How many tokens each expert got: one column an expert, from 0 to {last}",
    no_load="busiest: expert {expert} with {most} of {tokens} tokens; {idle} idle",
    lens="What each layer would say comes after “{token}”, were it the last",
    continuation="Continued",
    parts="Other parts of the layers, at the last token",
    by_table="experts by a fixed table of token ids; scores only weigh them",
    picks="the indexer shows it {seen} of {past} tokens",
    entry_picks="the indexer shows it {seen} of {past} entries of {tokens} tokens each",
    sinks="{share:.0%} of attention goes to the sinks",
    streams="{count} streams; {kept:.0%} of each stays in itself",
)
CHINESE = Labels(
    summary="{name}：共 {total} 参数；每层从 {n} 个专家中为词元选 {k} 个，"
    "只用到 {used}（{share:.0%}）。",
    dense_summary="{name}：共 {total} 参数，每个词元都要用到全部参数。",
    paths="每个词元在各层的首选专家（+ 是模型续写的）",
    token="词元",
    layer="层",
    column="层{at}",
    parameters="参数",
    shared="共享",
    next_token="下一个词元",
    load="各专家分到的词元数：一列一个专家，从 0 到 {last}",
    no_load="最忙：专家 {expert}，{tokens} 个词元中的 {most} 个；{idle} 个专家空闲",
    lens="假如到此为止，各层认为“{token}”之后是什么",
    continuation="续写",
    parts="各层的其他部件（最后一个词元处）",
    by_table="专家由词元编号的固定表决定，分数只作权重",
    picks="索引器让它看到 {past} 个词元中的 {seen} 个",
    entry_picks="索引器让它看到 {past} 个压缩条目中的 {seen} 个（每个条目 {tokens} 个词元）",
    sinks="注意力的 {share:.0%} 落在汇点上",
    streams="{count} 条残差流；各流平均保留自身的 {kept:.0%}",
)


def draw(trace: Trace, tokenizer: Tokenizer, console: Console) -> None:
    """Print the whole picture: paths, parameters, load, and the guesses layer by layer."""
    ids = [token.id for token in trace.tokens]
    prompt = tokenizer.decode(ids[: trace.prompt_tokens])
    labels = CHINESE if is_chinese(prompt) else ENGLISH
    blocks = BLOCKS if console.encoding.lower().startswith("utf") else PLAIN_BLOCKS
    width = min(console.width, WIDEST)
    console.print()
    console.print(_summary(trace, labels), width=width)
    if len(ids) > trace.prompt_tokens:
        made = tokenizer.decode(ids[trace.prompt_tokens :])
        _draw_continuation(prompt, made, labels, console, width)
    if any(layer.router for layer in trace.layers):
        _draw_paths(trace, labels, console, width)
        _draw_load(trace, labels, console, width, blocks)
    _draw_parts(trace, labels, console, width)
    _draw_lens(trace, labels, console, width)


def _summary(trace: Trace, labels: Labels) -> Text:
    total = trace.total_parameters
    used = sum(token.parameters_used for token in trace.tokens) / len(trace.tokens)
    routers = [layer.router for layer in trace.layers if layer.router]
    if not routers:
        return Text(labels.dense_summary.format(name=trace.model, total=_millions(total)))
    chosen = sum(len(ids) for r in routers for ids in r.topk_ids) / (
        len(routers) * len(trace.tokens)
    )
    return Text(
        labels.summary.format(
            name=trace.model,
            total=_millions(total),
            k=f"{chosen:.3g}",
            n=len(routers[0].scores[0]),
            used=_millions(used),
            share=used / total,
        )
    )


def _draw_continuation(
    prompt: str, made: str, labels: Labels, console: Console, width: int
) -> None:
    text = Text(f"{labels.continuation}: ", style="bold")
    text.append(prompt, style="not bold")
    text.append(
        " ▸ " if console.encoding.lower().startswith("utf") else " > ", style="not bold dim"
    )
    text.append(made, style="not bold italic")
    console.print(text, width=width)


def _draw_paths(trace: Trace, labels: Labels, console: Console, width: int) -> None:
    """One row a token: its leading expert in every layer, what worked on it, what comes next."""
    routed = [(at, layer.router) for at, layer in enumerate(trace.layers) if layer.router]
    shown = routed[-MOST_LAYERS:]
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(labels.token, no_wrap=True, max_width=13, min_width=8)
    for at, _ in shown:
        name = labels.column.format(at=at + 1)
        table.add_column(name, justify="right", no_wrap=True, min_width=3)
    table.add_column(labels.parameters, justify="right", no_wrap=True, min_width=6)
    has_shared = any(any(router.shared_share) for _, router in routed)
    if has_shared:
        table.add_column(labels.shared, justify="right", no_wrap=True, min_width=4)
    table.add_column(labels.next_token, no_wrap=True, overflow="ellipsis", ratio=1)
    for number, token in enumerate(trace.tokens):
        mark = "+" if number >= trace.prompt_tokens else " "
        leading = [ids[0] if (ids := r.topk_ids[number]) else None for _, r in shown]
        share = sum(router.shared_share[number] for _, router in routed) / len(routed)
        table.add_row(
            Text(mark + visible(token.text), style=_foreground(leading[-1])),
            *(Text("-" if e is None else f"{e}", style=_background(e)) for e in leading),
            _millions(token.parameters_used),
            *([f"{share:.0%}"] if has_shared else []),
            _guess(trace.guesses[number]),
        )
    console.print()
    console.print(Text(labels.paths, style="bold"), width=width)
    console.print(table, width=width)


def _draw_load(trace: Trace, labels: Labels, console: Console, width: int, blocks: str) -> None:
    routed = [(at, layer.router) for at, layer in enumerate(trace.layers) if layer.router]
    experts = len(routed[0][1].scores[0])
    console.print()
    console.print(Text(labels.load.format(last=experts - 1), style="bold"), width=width)
    columns = width - 8
    for at, router in routed:
        load = router.load
        most = max(load)
        line = Text(_head(at, labels))
        for start in range(0, experts, columns):
            if start:
                line.append("\n" + " " * 8)
            for expert in range(start, min(start + columns, experts)):
                level = -(-load[expert] * (len(blocks) - 1) // most)
                line.append(blocks[level], style=_foreground(expert))
        console.print(line, width=width, no_wrap=True)
        told = labels.no_load.format(
            expert=load.index(most), most=most, tokens=len(trace.tokens), idle=load.count(0)
        )
        console.print(Text(" " * 8 + told, style="dim"), width=width)


def _head(at: int, labels: Labels) -> str:
    """What a layer's line begins with, eight columns; people count layers from 1."""
    width = 8 - cell_len(labels.layer) + len(labels.layer)
    return f"{labels.layer} {at + 1:<3}".ljust(width)


def _draw_parts(trace: Trace, labels: Labels, console: Console, width: int) -> None:
    """What layers have beside attention to all tokens and learned choices, a line each."""
    told = [(at, _parts(layer, labels)) for at, layer in enumerate(trace.layers)]
    if not any(parts for _, parts in told):
        return
    console.print()
    console.print(Text(labels.parts, style="bold"), width=width)
    for at, parts in told:
        for number, part in enumerate(parts):
            line = Text(" " * 8 if number else _head(at, labels))
            line.append(part)
            console.print(line, width=width)


def _parts(layer: LayerTrace, labels: Labels) -> list[str]:
    parts: list[str] = []
    if layer.router is not None and layer.router.by_table:
        parts.append(labels.by_table)
    if layer.picks is not None:
        tokens, seen = layer.picks.tokens_per_slot, layer.picks.slots
        words = labels.picks if tokens == 1 else labels.entry_picks
        parts.append(words.format(seen=len(seen[-1]), past=len(seen) // tokens, tokens=tokens))
    if layer.sink_share is not None:
        parts.append(labels.sinks.format(share=layer.sink_share[-1]))
    if layer.mixing is not None:
        diagonals = [half.mix[-1][i][i] for half in layer.mixing for i in range(len(half.mix[-1]))]
        kept = sum(diagonals) / len(diagonals)
        parts.append(labels.streams.format(count=len(layer.mixing[0].pre[-1]), kept=kept))
    return parts


def _draw_lens(trace: Trace, labels: Labels, console: Console, width: int) -> None:
    """The guesses at the end of the prompt, as they form from layer to layer."""
    place = trace.prompt_tokens - 1
    title = labels.lens.format(token=visible(trace.tokens[place].text))
    console.print()
    console.print(Text(title, style="bold"), width=width)
    for at, layer in enumerate(trace.layers):
        line = Text(_head(at, labels))
        line.append(_guess(layer.guesses[place]))
        line.truncate(width, overflow="ellipsis")
        console.print(line, width=width, no_wrap=True)


def _guess(candidates: list[Candidate]) -> Text:
    """`“a” 42 %  “b” 17 %  …`, the likelier the brighter."""
    text = Text()
    for candidate in candidates[:3]:
        style = "bold" if candidate.probability >= 0.5 else ""
        text.append(f"{visible(candidate.text)} ", style=style or "default")
        text.append(f"{candidate.probability:.0%}  ", style="dim")
    return text


def _foreground(expert: int | None) -> str:
    return "dim" if expert is None else _hue(expert)


def _background(expert: int | None) -> str:
    return "dim" if expert is None else f"rgb(0,0,0) on {_hue(expert)}"


def _hue(expert: int) -> str:
    """A colour of its own for each expert, the same everywhere."""
    red, green, blue = colorsys.hls_to_rgb(expert * GOLDEN % 1.0, 0.6, 0.7)
    return f"rgb({int(red * 255)},{int(green * 255)},{int(blue * 255)})"


def visible(text: str) -> str:
    """A token's text with blanks, line ends and the bars of special tokens made plain."""
    if special := SPECIAL.fullmatch(text):
        return f"<{special[1]}>"
    if text.strip(" ") != text or not text:
        text = text.replace(" ", "␣")
    named = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(named.get(c, c if unicodedata.category(c)[0] != "C" else "?") for c in text)


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def _millions(count: float) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
