"""What was found, as one HTML page that needs nothing else, with its charts and data beside it."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from moescope.errors import UserError
from moescope.files import write_text
from moescope.lab import charts
from moescope.lab.compare import Comparison, Spread
from moescope.lab.plan import Plan
from moescope.lab.study import Study
from moescope.lab.units import of_bytes, of_parameters, plain
from moescope.lab.words import WORDS, Language, Words
from moescope.scope.ablation import Ablation
from moescope.scope.information import Floats
from moescope.scope.resampling import Interval
from moescope.scope.specialization import Specialization

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Finding = Plan | Specialization | Ablation | Comparison | Study
KINDS: dict[str, type[Finding]] = {
    "fits": Plan,
    "typical": Specialization,
    "forced": Ablation,
    "differences": Comparison,
    "summaries": Study,
}
"""What a JSON file holds, by a field that only this kind has; also the order in a report."""
DEVOTED = 3
"""Experts that a table shows for each domain."""
CHANCE = 0.05
"""Share of 95 % intervals that leave out the truth."""


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """One finding, told.

    Attributes:
        title, paragraphs: text.
        file: name of the JSON file with all numbers, or of several, with commas.
        version: of the moescope that measured.
        commands: that made them, where they are known.
        figures: by title, not drawn yet.
        charts: the same, drawn.
        tables: of numbers.
    """

    title: str
    paragraphs: list[str]
    file: str
    version: str
    commands: list[str] = field(default_factory=list[str])
    figures: "dict[str, Figure]" = field(default_factory=dict[str, "Figure"])
    charts: list[Chart] = field(default_factory=list[Chart])
    tables: list[Table] = field(default_factory=list[Table])

    @property
    def stem(self) -> str:
        """What its charts are called: as its files."""
        return "-".join(Path(name).stem for name in self.file.split(", "))


def write_report(files: Sequence[Path], out: Path, language: Language) -> Path:
    """Write `report.html` into the folder `out`, every chart as SVG and PNG, and the data.

    Args:
        files: what `moescope plan`, `specialize`, `ablate`, `compare` and `study` saved.
        out: receives everything.
        language: of all text.

    Returns:
        The page's path.

    Raises:
        UserError: a file holds nothing of that kind, two have the same name, or matplotlib is
            not installed.
    """
    words = WORDS[language]
    findings = {path: read_finding(path) for path in files}
    names = [path.name for path in findings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two files are called {name}; rename one, they are copied to {out}")
    kinds = list(KINDS.values())
    ordered = sorted(findings, key=lambda path: kinds.index(type(findings[path])))
    with charts.style():
        sections = [_section(path, findings[path], words) for path in ordered]
        sections += list(_causes({path.name: findings[path] for path in ordered}, words))
        for section in sections:
            for number, (title, made) in enumerate(section.figures.items(), start=1):
                svg = charts.save(made, out / f"{section.stem}-{number}")
                section.charts.append(Chart(title, Markup(svg)))
    for path in ordered:
        if path.resolve() != (out / path.name).resolve():
            shutil.copyfile(path, out / path.name)
    page = _template().render(
        language=language, words=words, sections=sections, version=version("moescope")
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def read_finding(path: Path) -> Finding:
    """Read what one of the commands saved.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    for name, kind in KINDS.items():
        if isinstance(fields, dict) and name in fields:
            return kind.from_file(path)
    raise UserError(
        f"{path} is nothing to report on; give files that plan, specialize, ablate or compare "
        "wrote with --save, or a study's study.json"
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _section(path: Path, found: Finding, words: Words) -> Section:
    if isinstance(found, Plan):
        return _plan(path.name, found, words)
    if isinstance(found, Specialization):
        return _specialization(path.name, found, words)
    if isinstance(found, Ablation):
        return _ablation(path.name, found, words)
    if isinstance(found, Comparison):
        return _comparison(path.name, found, words)
    return _study(path.name, found, words)


def _seen(held_out: dict[str, bool], domains: Sequence[str], words: Words) -> str:
    """Whether the models were trained on what they read, as far as it is known."""
    unknown = [words.name(domain) for domain in domains if not held_out.get(domain)]
    if not unknown:
        return words.held_out
    return words.maybe_seen.format(domains=words.comma.join(unknown))


def _commands(*made_by: str) -> list[str]:
    """Each command once; data that no command made has none."""
    return list(dict.fromkeys(filter(None, made_by)))


# --- what it asks of a machine -------------------------------------------------------------------


def _plan(file: str, found: Plan, words: Words) -> Section:
    parameters, cache = found.parameters, found.cache
    text = words.plan_text.format(
        total=of_parameters(parameters.total),
        active=of_parameters(parameters.active),
        share=parameters.active / parameters.total,
        cache=of_bytes(cache.bytes_per_token),
        plain=of_bytes(cache.plain_bytes_per_token),
        times=cache.plain_bytes_per_token / cache.bytes_per_token,
    )
    counts = {title: getattr(parameters, part) for part, title in words.plan_parts.items()}
    parts = [
        [title, of_parameters(count), f"{count / parameters.total:.2%}"]
        for title, count in counts.items()
        if count
    ]
    section = Section(
        title=words.plan.format(name=found.name),
        paragraphs=[text],
        file=file,
        version=found.version,
        commands=_commands(found.command),
        tables=[Table("", ["", words.count, words.of_all], parts), _fits(found, words)],
    )
    if (speed := found.speed) is not None:
        told = {"seconds": speed.seconds, "threads": speed.threads, "machine": speed.machine}
        section.paragraphs.append(words.speed_text.format(prompt=speed.prompt, **told))
        section.figures[words.roofline] = charts.roofline(speed, words)
        rates = [
            [one.format, *(plain(getattr(one, name), 4) for name in words.speed_head)]
            for one in speed.speeds
        ]
        head = [words.plan_costs["format"], *words.speed_head.values()]
        section.tables.append(Table("", head, rates))
    return section


def _fits(found: Plan, words: Words) -> Table:
    told = words.plan_costs
    rows = [
        [
            told.get(fit.format, fit.format),
            of_bytes(found.weights_in(fit.format)),
            of_bytes(fit.needed),
            f"{told['yes' if fit.fits else 'no']} ({of_bytes(fit.room)}, "
            f"{told.get(fit.place, fit.place)})",
            f"{fit.longest_context:,}" if fit.longest_context else "-",
            of_bytes(found.bytes_read_in(fit.format)),
        ]
        for fit in found.fits
    ]
    heads = [told[name] for name in ("format", "weights", "needed", "fits", "longest", "read")]
    return Table("", [head.format(context=found.work.context) for head in heads], rows)


# --- who serves whom -----------------------------------------------------------------------------


def _specialization(file: str, found: Specialization, words: Words) -> Section:
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
        paragraphs=[text, _seen(found.held_out, found.domains, words)],
        file=file,
        version=found.version,
        commands=_commands(found.command),
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


def _ablation(file: str, found: Ablation, words: Words) -> Section:
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
        paragraphs=[text, _seen(found.held_out, found.domains, words)],
        file=file,
        version=found.version,
        commands=_commands(found.command),
        figures={
            words.cost: charts.expert_maps(
                cost, list(map(words.name, found.domains)), found.layers, words.cost_axis, words
            )
        },
        tables=[
            Table(words.missed, [words.domain, words.expert, words.nats, words.interval], rows)
        ],
    )


def _causes(findings: Mapping[str, Finding], words: Words) -> Iterator[Section]:
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
        commands=_commands(found.command, ablation.command),
        figures={words.cause: charts.scatter(points, words.cause_axis, words.cost_axis)},
    )


# --- side by side --------------------------------------------------------------------------------


def _comparison(file: str, found: Comparison, words: Words) -> Section:
    names = [result.name for result in found.results]
    domains = list(found.documents)
    shown = list(map(words.name, domains))
    text = words.comparison_text.format(
        documents=sum(found.documents.values()),
        text_bytes=sum(found.text_bytes.values()),
        rounds=found.rounds,
        threads=found.threads,
        machine=found.machine,
    )
    quality = {
        result.name: [result.quality[domain].bits_per_byte for domain in domains]
        for result in found.results
    }
    difference = {
        other.name: [other.bits_per_byte[domain] for domain in domains]
        for other in found.differences
    }
    speed = {
        f"{title}, {words.milliseconds}": {"": [_milliseconds(spread) for spread in spreads]}
        for title, spreads in {
            words.first_token: [result.time_to_first_token for result in found.results],
            words.further_token: [result.time_per_token for result in found.results],
        }.items()
    }
    costs = [
        [
            title,
            *(
                plain(getattr(result, name), 4)
                if name == "bytes_per_token"
                else f"{getattr(result, name):,}"
                for result in found.results
            ),
        ]
        for name, title in words.costs.items()
    ]
    costs.append(
        [
            words.joules,
            *(
                f"{result.joules_per_token.median:.3g}"
                if result.joules_per_token
                else words.not_available
                for result in found.results
            ),
        ]
    )
    over_seeds = [
        words.over_seeds.format(
            name=other.name,
            first=names[0],
            seeds=len(found.results[0].bits_of_seeds),
            **dataclasses.asdict(other.over_seeds),
        )
        for other in found.differences
        if other.over_seeds is not None
    ]
    return Section(
        title=words.comparison.format(models=words.comma.join(names)),
        paragraphs=[text, _seen(found.held_out, domains, words), *over_seeds],
        file=file,
        version=found.version,
        commands=_commands(found.command),
        figures={
            words.quality: charts.intervals({words.quality_axis: quality}, shown, zero=False),
            words.difference.format(first=names[0]): charts.intervals(
                {words.difference_axis: difference}, shown, zero=True
            ),
            words.speed: charts.intervals(speed, names, zero=True),
        },
        tables=[Table("", [words.model, *names], costs)],
    )


def _milliseconds(spread: Spread) -> Interval:
    return Interval(1e3 * spread.median, 1e3 * spread.least, 1e3 * spread.most)


# --- studies -------------------------------------------------------------------------------------


def _study(file: str, found: Study, words: Words) -> Section:
    cases = [words.name(summary.case) for summary in found.summaries]
    measures = words.study_measures
    text = words.study_text.format(
        cases=len(cases), seeds=found.summaries[0].seeds, tokens=found.rows[0].tokens
    )
    against = [summary.against_first["held_out_loss"] for summary in found.summaries]
    drawn = ("max_violation", "mutual_information", "tokens_per_second")
    rows = [
        [
            words.name(summary.case),
            *(
                f"{plain(summary.measures[m].value, 4)} ± {plain(_half(summary.measures[m]), 2)}"
                for m in measures
            ),
        ]
        for summary in found.summaries
    ]
    notes = [
        words.note.format(case=words.name(summary.case), note=words.name(summary.note))
        for summary in found.summaries
        if summary.note
    ]
    return Section(
        title=words.study.format(name=words.name(found.study)),
        paragraphs=[text, *notes],
        file=file,
        version=found.rows[0].version,
        commands=_commands(*(row.command for row in found.rows)),
        figures={
            words.against.format(first=cases[0]): charts.intervals(
                {words.nats: {"": against}}, cases, zero=True
            ),
            "; ".join(measures[name] for name in drawn): charts.intervals(
                {
                    measures[name]: {"": [summary.measures[name] for summary in found.summaries]}
                    for name in drawn
                },
                cases,
                zero=False,
            ),
        },
        tables=[Table("", [words.case, *measures.values()], rows)],
    )


def _half(interval: Interval) -> float:
    return interval.high - interval.value
