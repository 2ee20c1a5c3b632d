"""`moescope plan`: what a model asks of a machine, before anything is downloaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moescope.lab.speed import Prediction


def plan(
    name_or_path: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME_OR_PATH]",
            help="A published model, a folder with config.json, such a file, a .gguf, or a Hub "
            "name, of which the headers are read; all published models if left out.",
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Also predict tokens per second, from some seconds of measuring."
        ),
    ] = False,
    prompt: Annotated[
        int, typer.Option(min=1, help="With --speed: tokens before those that are generated.")
    ] = 512,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the roofline into this file; measures, as --speed.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Likewise, as PNG.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the result into this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or a list of them.")
    ] = False,
) -> None:
    """Count parameters, memory and work of a model, from config and headers alone."""
    from dataclasses import replace

    from rich.console import Console

    from moescope.catalog import catalog
    from moescope.cli.command import command_line
    from moescope.cli.plan_drawing import draw, draw_overview
    from moescope.errors import UserError
    from moescope.lab.plan import plan as make_plan

    measures = bool(speed or svg or png)
    if name_or_path is None:
        if measures or save:
            raise UserError("name the model to plan for; without a name, all are only listed")
        plans = [make_plan(name) for name in catalog()]
        if as_json:
            print(json.dumps([made.to_dict() for made in plans], ensure_ascii=False))
        else:
            draw_overview(plans, Console(highlight=False))
        return
    if measures:
        with Console(stderr=True).status("timing a few of its layers"):
            made = make_plan(name_or_path, speed=True, prompt=prompt)
    else:
        made = make_plan(name_or_path)
    made = replace(made, command=command_line())
    if made.speed is not None and (svg or png):
        _draw_roofline(made.speed, svg, png)
    if save is not None:
        made.save(save)
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False))
    else:
        draw(made, Console(highlight=False))


def _draw_roofline(speed: "Prediction", svg: Path | None, png: Path | None) -> None:
    from moescope.lab import charts
    from moescope.lab.words import WORDS

    with charts.style():
        figure = charts.roofline(speed, WORDS["en"])
        if svg is not None:
            charts.write_svg(figure, svg)
        if png is not None:
            charts.write_png(figure, png)
