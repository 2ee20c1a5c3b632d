"""Sections of a report on experts: whom each serves, what it is worth, if one tells the other."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from moescope.lab import charts
from moescope.lab.sections import Section, Table, commands, seen
from moescope.lab.words import Words
from moescope.scope.ablation import Ablation
from moescope.scope.information import Floats
from moescope.scope.specialization import Specialization

DEVOTED = 3
"""Experts that a table shows for each domain."""
CHANCE = 0.05
"""Share of 95 % intervals that leave out the truth."""


def specialization_section(file: str, found: Specialization, words: Words) -> Section:
    """Return what is told of whom each expert serves."""
    load = np.array(found.load)  # (domains, layers, experts)
    best = int(np.argmax(found.mutual_information))
    text = words.specialization_text.format(
        tokens=sum(found.tokens),
        documents=sum(found.documents),
        domains=len(found.domains),
        best=found.layers[best] + 1,
        bits=found.mutual_information[best],
        most=math.log2(len(found.domains)),
        first=found.token_share[0],
        last=found.token_share[-1],
        first_layer=found.layers[0] + 1,
        last_layer=found.layers[-1] + 1,
    )
    even = load * load.shape[-1]
    information = (
        words.information,
        words.information_axis,
        found.mutual_information,
        found.mutual_information_error,
    )
    token = (words.token_share, words.token_share_axis, found.token_share, None)
    return Section(
        title=words.specialization.format(model=found.model),
        paragraphs=[text, seen(found.held_out, found.domains, words)],
        file=file,
        version=found.version,
        commands=commands(found.command),
        figures={
            words.load: charts.expert_maps(
                even, list(map(words.name, found.domains)), found.layers, words.relative_load, words
            ),
            f"{words.information}; {words.token_share}": charts.layer_bars(
                [information, token], found.layers, words
            ),
        },
        tables=[_devoted(found, load, words)],
    )


def _devoted(found: Specialization, load: Floats, words: Words) -> Table:
    """The experts with the largest part of their load from one domain, and at least a fair one."""
    devotion = load / np.maximum(load.sum(axis=0), 1e-12)
    devotion[load < 1 / load.shape[-1]] = 0
    rows: list[list[str]] = []
    for domain, name in enumerate(found.domains):
        order = np.argsort(-devotion[domain], axis=None)[:DEVOTED]
        for position, expert in zip(*np.unravel_index(order, devotion[domain].shape), strict=True):
            typical = "  ".join(_spelled(token.text) for token in found.typical[position][expert])
            layer = words.layer.format(layer=found.layers[position] + 1)
            share = f"{devotion[domain, position, expert]:.0%}"
            rows.append([words.name(name), f"{layer}, {words.expert} {expert}", share, typical])
    return Table(words.devoted, [words.domain, words.expert, words.share, words.typical], rows)


def _spelled(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


# --- without each expert -------------------------------------------------------------------------


def ablation_section(file: str, found: Ablation, words: Words) -> Section:
    """Return what is told of a model without each of its experts."""
    cost, low, high = np.array(found.cost), np.array(found.low), np.array(found.high)
    text = (words.forced_text if found.forced else words.ablation_text).format(
        tokens=sum(found.tokens),
        documents=sum(found.documents),
        all=cost.size,
        worse=int((low > 0).sum()),
        better=int((high < 0).sum()),
        chance=cost.size * CHANCE,
    )
    rows: list[list[str]] = []
    for domain, name in enumerate(found.domains):
        order = np.argsort(-cost[domain], axis=None)[:DEVOTED]
        for position, expert in zip(*np.unravel_index(order, cost[domain].shape), strict=True):
            at = (domain, position, expert)
            layer = words.layer.format(layer=found.layers[position] + 1)
            rows.append(
                [
                    words.name(name),
                    f"{layer}, {words.expert} {expert}",
                    f"{cost[at]:+.4f}",
                    f"{low[at]:+.4f} … {high[at]:+.4f}",
                ]
            )
    return Section(
        title=words.ablation.format(model=found.model),
        paragraphs=[text, seen(found.held_out, found.domains, words)],
        file=file,
        version=found.version,
        commands=commands(found.command),
        figures={
            words.cost: charts.expert_maps(
                cost, list(map(words.name, found.domains)), found.layers, words.cost_axis, words
            )
        },
        tables=[
            Table(words.missed, [words.domain, words.expert, words.nats, words.interval], rows)
        ],
    )


def cause_sections(findings: Mapping[str, object], words: Words) -> Iterator[Section]:
    """Where the same model's load and ablation are at hand: does one tell the other?"""
    for file, ablation in findings.items():
        for other, found in findings.items():
            if (
                isinstance(found, Specialization)
                and isinstance(ablation, Ablation)
                and not ablation.forced
                and (found.model, found.domains) == (ablation.model, ablation.domains)
                and {*ablation.layers} <= {*found.layers}
            ):
                yield _cause(f"{other}, {file}", found, ablation, words)


def _cause(files: str, found: Specialization, ablation: Ablation, words: Words) -> Section:
    from scipy import stats

    positions = [found.layers.index(layer) for layer in ablation.layers]
    points: dict[str, tuple[list[float], list[float]]] = {}
    correlations: list[str] = []
    for domain, name in enumerate(found.domains):
        load = [share for position in positions for share in found.load[domain][position]]
        cost = [nats for by_expert in ablation.cost[domain] for nats in by_expert]
        points[words.name(name)] = load, cost
        correlations.append(f"{words.name(name)} {stats.spearmanr(load, cost)[0]:.2f}")
    return Section(
        title=words.cause,
        paragraphs=[words.cause_text.format(list=words.comma.join(correlations))],
        file=files,
        version=found.version,
        commands=commands(found.command, ablation.command),
        figures={words.cause: charts.scatter(points, words.cause_axis, words.cost_axis)},
    )
