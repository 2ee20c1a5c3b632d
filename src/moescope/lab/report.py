"""What was found, as one HTML page that needs nothing else, with its charts and data beside it."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jinja2
from markupsafe import Markup

from moescope.errors import UserError
from moescope.files import write_text
from moescope.lab import charts
from moescope.lab.compare import Comparison, Spread
from moescope.lab.expert_sections import ablation_section, cause_sections, specialization_section
from moescope.lab.plan import Plan
from moescope.lab.sections import Chart, Section, Table, commands, seen
from moescope.lab.study import Study
from moescope.lab.units import of_bytes, of_parameters, plain
from moescope.lab.words import WORDS, Language, Words
from moescope.scope.ablation import Ablation
from moescope.scope.resampling import Interval
from moescope.scope.specialization import Specialization

Finding = Plan | Specialization | Ablation | Comparison | Study
KINDS: dict[str, type[Finding]] = {
    "fits": Plan,
    "typical": Specialization,
    "forced": Ablation,
    "differences": Comparison,
    "summaries": Study,
}
"""What a JSON file holds, by a field that only this kind has; also the order in a report."""


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
        sections += list(cause_sections({path.name: findings[path] for path in ordered}, words))
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
        return specialization_section(path.name, found, words)
    if isinstance(found, Ablation):
        return ablation_section(path.name, found, words)
    if isinstance(found, Comparison):
        return _comparison(path.name, found, words)
    return _study(path.name, found, words)


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
        commands=commands(found.command),
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
        paragraphs=[text, seen(found.held_out, domains, words), *over_seeds],
        file=file,
        version=found.version,
        commands=commands(found.command),
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
        commands=commands(*(row.command for row in found.rows)),
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
