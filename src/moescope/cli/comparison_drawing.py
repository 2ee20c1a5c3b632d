"""A comparison as tables in the terminal: one column a model."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moescope.cli.drawing import WIDEST
from moescope.lab.compare import Comparison, Difference, Quality, Result, Spread
from moescope.scope.resampling import Interval

NOTE = "± and [ ]: 95 % over documents; seconds: median of the rounds (least to most)"


def draw(found: Comparison, console: Console) -> None:
    """Print what each model is, how it did, and each against the first."""
    width = min(console.width, WIDEST)
    documents, text_bytes = sum(found.documents.values()), sum(found.text_bytes.values())
    told = f"{documents:,} documents, {text_bytes:,} bytes; {found.rounds} rounds on "
    told += f"{found.threads} threads of {found.machine}"
    console.print()
    console.print(Text(told), width=width)
    console.print(_results(found), width=width)
    for difference in found.differences:
        console.print()
        title = f"{short(difference.name)} against {short(found.results[0].name)}"
        console.print(Text(title, style="bold"), width=width)
        console.print(_difference(difference), width=width)
    console.print(Text(NOTE, style="dim"), width=width)


def short(name: str) -> str:
    """The last part of a path or Hub name."""
    return Path(name).name


def _results(found: Comparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for result in found.results:
        table.add_column(short(result.name), justify="right", no_wrap=True)
    for title, cells in {
        "parameters": [_millions(r.total_parameters) for r in found.results],
        "  active for a token": [_millions(r.active_parameters) for r in found.results],
        "weights in memory": [f"{r.weight_bytes / 1e6:,.1f} MB" for r in found.results],
        "  read for a token": [f"{r.weight_bytes_per_token / 1e6:,.1f} MB" for r in found.results],
        "operations a token": [f"{r.flops_per_token / 1e6:,.1f} MFLOP" for r in found.results],
        "cache a token": [f"{r.cache_bytes_per_token / 1e3:,.2f} KB" for r in found.results],
        "context": [f"{r.context:,}" for r in found.results],
        "memory, context full": [f"{r.memory_bytes / 1e6:,.1f} MB" for r in found.results],
        "tokens read at once": [f"{r.window:,}" if r.window else "" for r in found.results],
        "bytes of text a token": [f"{r.bytes_per_token:.2f}" for r in found.results],
        "first token after": [_spread(r.time_to_first_token) for r in found.results],
        "each further token": [_spread(r.time_per_token) for r in found.results],
        "  joules": [_joules(r.joules_per_token) for r in found.results],
        "bits per byte, all": [_sure(r.overall) for r in found.results],
    }.items():
        table.add_row(title, *cells)
    for domain in found.documents:
        table.add_row(f"  {domain}", *(_domain(result, domain) for result in found.results))
    return table


def _difference(difference: Difference) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row("bits per byte, all", _change(difference.overall))
    for domain, interval in difference.bits_per_byte.items():
        table.add_row(f"  {domain}", _change(interval))
    if difference.over_seeds is not None:
        table.add_row("  over seeds", _change(difference.over_seeds))
    for title, ratio in {
        "first token": difference.time_to_first_token,
        "further tokens": difference.time_per_token,
    }.items():
        told = f"{ratio.median:.2f} times as long ({ratio.least:.2f} to {ratio.most:.2f})"
        table.add_row(title, told)
    return table


def _domain(result: Result, domain: str) -> str:
    return _sure(result.quality[domain])


def _sure(quality: Quality) -> str:
    interval = quality.bits_per_byte
    return f"{interval.value:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _change(interval: Interval) -> str:
    told = f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    if not interval.is_certain:
        return f"{told}  not certain"
    return f"{told}  {'better' if interval.value < 0 else 'worse'}"


def _spread(seconds: Spread) -> str:
    median, least, most = (1e3 * s for s in (seconds.median, seconds.least, seconds.most))
    return f"{median:.1f} ({least:.1f}-{most:.1f}) ms"


def _joules(spread: Spread | None) -> str:
    if spread is None:
        return "not available"
    return f"{spread.median:.3g} ({spread.least:.3g}-{spread.most:.3g})"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
