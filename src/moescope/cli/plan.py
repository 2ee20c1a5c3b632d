"""`moescope plan`: what a model asks of a machine, before anything is downloaded."""

import json
from typing import Annotated

import typer


def plan(
    name_or_path: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME_OR_PATH]",
            help="A published model, a folder with config.json, or such a file; "
            "all published models if left out.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or a list of them.")
    ] = False,
) -> None:
    """Count parameters, memory and work of a model from its config alone."""
    from rich.console import Console

    from moescope.catalog import catalog
    from moescope.cli.plan_drawing import draw, draw_overview
    from moescope.lab.plan import plan as make_plan

    names = list(catalog()) if name_or_path is None else [name_or_path]
    plans = [make_plan(name) for name in names]
    if as_json:
        found = [made.to_dict() for made in plans]
        print(json.dumps(found if name_or_path is None else found[0], ensure_ascii=False))
    elif name_or_path is None:
        draw_overview(plans, Console(highlight=False))
    else:
        draw(plans[0], Console(highlight=False))
