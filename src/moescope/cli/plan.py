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
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Also what training on so many H800 takes: bytes on the wire of each placement.",
        ),
    ] = None,
    tokens: Annotated[
        float, typer.Option(min=1e-6, help="With --gpus: trillions of tokens that are learned.")
    ] = 1.0,
    save: Annotated[Path | None, typer.Option(help="Also write the result into this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or a list of them.")
    ] = False,
) -> None:
    """Count parameters, memory and work of a model, from config and headers alone."""
    from dataclasses import asdict, replace

    from rich.console import Console

    from moescope.catalog import catalog
    from moescope.cli.command import command_line
    from moescope.cli.plan_drawing import draw, draw_overview, draw_placements
    from moescope.errors import UserError
    from moescope.lab.cluster import placements
    from moescope.lab.plan import plan as make_plan

    measures = bool(speed or svg or png)
    if name_or_path is None:
        if measures or save or gpus:
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
    dealt = [
        placement
        for number in _numbers(gpus)
        for placement in placements(made.config, number, tokens * 1e12)
    ]
    if as_json:
        told = made.to_dict()
        if gpus:
            told["placements"] = [asdict(placement) for placement in dealt]
        print(json.dumps(told, ensure_ascii=False))
    else:
        draw(made, Console(highlight=False))
        if gpus:
            draw_placements(dealt, tokens, Console(highlight=False))


def _numbers(text: str | None) -> list[int]:
    from moescope.errors import UserError

    parts = text.replace(" ", "").split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--gpus {text} says no numbers of GPUs; write them as --gpus 8,64,2048")
    return [int(part) for part in parts]


def _draw_roofline(speed: "Prediction", svg: Path | None, png: Path | None) -> None:
    from moescope.lab import charts
    from moescope.lab.words import WORDS

    with charts.style():
        figure = charts.roofline(speed, WORDS["en"])
        if svg is not None:
            charts.write_svg(figure, svg)
        if png is not None:
            charts.write_png(figure, png)
