"""The charts of a report, as matplotlib figures.

Colours are a scale that rises in brightness, so that it reads in grey and without telling red
from green (cividis, Nunez et al. 2018); series differ by marker as well as by colour (Okabe and
Ito 2008). Text stays text in SVG, so that a browser draws Chinese with its own fonts.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moescope.errors import UserError
from moescope.files import atomic_path, write_text
from moescope.lab.speed import Prediction
from moescope.lab.words import Words
from moescope.scope.resampling import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE = "cividis"
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":")
WIDTH = 9.0  # inches
SMALLEST = 7
"""Points of the smallest text; the page shows no chart so narrow that it has under nine pixels."""
MOST_NUMBERS = 72
"""Experts whose numbers fit under a map."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
}
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
)
"""Any of them that is installed is used where the first font lacks a character."""


@contextmanager
def style() -> Generator[None]:
    """Make figures drawn inside look like a report's.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.font_manager import get_font_names
    except ImportError:
        raise UserError(
            "charts need the package matplotlib; install it with: pip install 'moescope[lab]'"
        ) from None
    fonts = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in get_font_names())]
    with mpl.rc_context({**STYLE, "font.family": fonts}):
        yield


def figure(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of the reports' width and its axes, row by row."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    return made, list(axes.ravel())


def expert_maps(
    values: npt.NDArray[np.float64],
    domains: Sequence[str],
    layers: Sequence[int],
    scale: str,
    words: Words,
) -> Figure:
    """Draw `(domains, layers, experts)` numbers, one map a layer, experts sorted by domain."""
    made, axes = figure(len(layers), 1, 0.6 + len(layers) * (0.45 + 0.13 * len(domains)))
    least, most = min(0.0, float(values.min())), float(values.max())
    picture = None
    for position, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        rows = values[:, position]
        order = np.lexsort((-rows.max(axis=0), rows.argmax(axis=0)))
        picture = axis.imshow(
            rows[:, order], aspect="auto", cmap=SCALE, vmin=least, vmax=most, interpolation="none"
        )
        axis.set_yticks(range(len(domains)), domains, fontsize=SMALLEST)
        numbers = [str(expert) for expert in order] if len(order) <= MOST_NUMBERS else []
        axis.set_xticks(range(len(numbers)), numbers, fontsize=SMALLEST, rotation=90)
        axis.set_title(words.layer.format(layer=layer + 1), fontsize=8, loc="left")
        axis.tick_params(length=0)
    axes[-1].set_xlabel(words.expert)
    assert picture is not None
    made.colorbar(picture, ax=axes, label=scale)
    return made


def layer_bars(
    panels: Sequence[tuple[str, str, Sequence[float], Sequence[float] | None]],
    layers: Sequence[int],
    words: Words,
) -> Figure:
    """Draw a bar for each layer; a panel is a title, an axis label, heights, and errors."""
    made, axes = figure(1, len(panels), 2.4)
    names = [words.layer.format(layer=layer + 1) for layer in layers]
    for axis, (title, label, heights, errors) in zip(axes, panels, strict=True):
        axis.bar(names, heights, yerr=errors, color="#56B4E9", edgecolor="black", capsize=3)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(label)
        axis.axhline(0, color="black", linewidth=0.8)
    return made


def intervals(
    panels: Mapping[str, Mapping[str, Sequence[Interval]]], names: Sequence[str], zero: bool
) -> Figure:
    """Draw numbers with their intervals, one row a name, one panel a measure.

    Args:
        panels: axis label -> series -> an interval for each name.
        names: of the rows, from the top.
        zero: draw a line at zero.
    """
    series = len(next(iter(panels.values())))
    made, axes = figure(1, len(panels), 0.9 + len(names) * (0.16 + 0.14 * series))
    places = np.arange(len(names), dtype=float)
    for number, (axis, (label, drawn)) in enumerate(zip(axes, panels.items(), strict=True)):
        for at, (name, measured) in enumerate(drawn.items()):
            shift = (at - (series - 1) / 2) * 0.6 / series
            values = np.array([interval.value for interval in measured])
            ends = np.array([(interval.low, interval.high) for interval in measured]).T
            axis.errorbar(
                values,
                places + shift,
                xerr=np.abs(ends - values),
                fmt=MARKERS[at % len(MARKERS)],
                color=COLOURS[at % len(COLOURS)],
                markersize=4,
                capsize=2,
                label=name,
            )
        axis.set_yticks(places, names if not number else [""] * len(names))
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel(label, fontsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        shown = [interval for measured in drawn.values() for interval in measured]
        if min((i.low if zero else i.value for i in shown), default=-1.0) >= 0:
            axis.set_xlim(left=max(0.0, axis.get_xlim()[0]))  # room that means nothing
        if zero:
            axis.axvline(0, color="black", linewidth=0.8)
    if series > 1:
        axes[0].legend(frameon=False, fontsize=SMALLEST)
    return made


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str
) -> Figure:
    """Draw a panel of points for each name, all on the same axes."""
    made, axes = figure(1, len(points), 2.3)
    widest = max(max(xs) for xs, _ in points.values())
    lowest = min(min(ys) for _, ys in points.values())
    highest = max(max(ys) for _, ys in points.values())
    room = 0.05 * (highest - lowest) or 1.0
    for number, (axis, (name, (xs, ys))) in enumerate(zip(axes, points.items(), strict=True)):
        axis.scatter(xs, ys, s=6, color="#0072B2", alpha=0.6, linewidths=0)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlim=(0, widest * 1.05), ylim=(lowest - room, highest + room))
        axis.set_title(name, fontsize=8)
        axis.set_xlabel(across, fontsize=SMALLEST)
        axis.tick_params(labelsize=SMALLEST, labelleft=not number)
    axes[0].set_ylabel(up)
    return made


def roofline(prediction: Prediction, words: Words) -> Figure:
    """Draw what memory and arithmetic allow, and where reading and writing of a model stand.

    Operations a second over operations for each byte that is read, both logarithmic (Williams,
    Waterman and Patterson 2009).
    """
    made, (axis,) = figure(1, 1, 4.2)
    speeds = prediction.speeds
    decode = [speed.decode_flops / speed.decode_bytes for speed in speeds]
    widest = 4 * max(*(speed.prefill_intensity for speed in speeds), *decode)
    intensity = np.geomspace(min(decode) / 3, widest, 200)
    for at, (speed, written) in enumerate(zip(speeds, decode, strict=True)):
        colour, peak = COLOURS[at], prediction.gemm_peak[speed.format]
        roof = np.minimum(prediction.read_bandwidth * intensity, peak)
        name = words.roof.format(format=speed.format, peak=peak / 1e9)
        axis.plot(intensity, roof / 1e9, color=colour, linestyle=DASHES[at], label=name)
        for marker, x, rate in (
            ("o", written, speed.decode * speed.decode_flops),
            ("s", speed.prefill_intensity, speed.prefill * speed.prefill_flops),
        ):
            axis.plot(x, rate / 1e9, marker, color=colour, markeredgecolor="black")
    for marker, name in (("o", words.writing), ("s", words.reading)):
        axis.plot([], [], marker, color="white", markeredgecolor="black", label=name)
    axis.set(xscale="log", yscale="log", xlabel=words.intensity, ylabel=words.flop_rate)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    slope = words.slope.format(bandwidth=prediction.read_bandwidth / 1e9)
    axis.annotate(
        slope,
        (intensity[40], prediction.read_bandwidth * intensity[40] / 1e9),
        (-6, 6),
        textcoords="offset points",
        fontsize=8,
        horizontalalignment="right",
    )
    return made


def save(made: Figure, stem: Path) -> str:
    """Write a figure as `stem.svg`, and as `stem.png` if there are fonts for its text.

    Returns:
        The SVG as it can stand inside a page, with ids of its own.
    """
    svg = write_svg(made, stem.with_name(f"{stem.name}.svg"))
    png = stem.with_name(f"{stem.name}.png")
    if not write_png(made, png):
        png.unlink()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", svg)


def write_svg(made: Figure, path: Path) -> str:
    """Write a figure into the file `path`, the same bytes each time; return them."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": path.stem}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        made.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(path, buffer.getvalue())
    return buffer.getvalue()


def write_png(made: Figure, path: Path) -> bool:
    """Write a figure into the file `path`; False if a character of its text had no font."""
    with warnings.catch_warnings(record=True) as missing, atomic_path(path) as partial:
        warnings.simplefilter("always")
        made.savefig(partial, format="png", dpi=200)
    return not any("missing" in str(warning.message) for warning in missing)
