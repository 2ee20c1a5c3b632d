"""A study as a table in the terminal: one row a case."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moescope.cli.drawing import WIDEST
from moescope.lab.study import Study
from moescope.scope.resampling import Interval

NOTE = (
    "loss: held-out nats a token, mean over domains; MaxVio: the busiest expert's surplus over an "
    "even share; dead: experts without a token; bits: what an expert tells about the domain. "
    "± and [ ]: 95 % over seeds."
)


def draw(study: Study, console: Console) -> None:
    """Print every case with its mean over seeds, and its difference from the first case."""
    width = min(console.width, WIDEST)
    first = study.summaries[0]
    title = f"{study.study}: {first.seeds} seeds each, {study.rows[0].tokens:,} tokens"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("case", overflow="fold")
    for column in ("loss", "against first", "MaxVio", "dead", "bits", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for summary in study.summaries:
        measures = summary.measures
        table.add_row(
            f"{summary.case} *" if summary.note else summary.case,
            _sure(measures["held_out_loss"]),
            "" if summary is first else _change(summary.against_first["held_out_loss"]),
            f"{measures['max_violation'].value:.2f}",
            f"{measures['dead_share'].value:.0%}",
            f"{measures['mutual_information'].value:.2f}",
            f"{measures['tokens_per_second'].value:,.0f}",
        )
    console.print()
    console.print(Text(title, style="bold"), width=width)
    console.print(table, width=width)
    for summary in study.summaries:
        if summary.note:
            console.print(Text(f"* {summary.case}: {summary.note}", style="dim"), width=width)
    console.print(Text(NOTE, style="dim"), width=width)


def _sure(interval: Interval) -> str:
    return f"{interval.value:.3f} ± {interval.high - interval.value:.3f}"


def _change(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
