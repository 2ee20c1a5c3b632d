"""`moescope study`: claims about mixtures of experts, tried on your own text."""

from pathlib import Path
from typing import Annotated

import typer


def study(
    name: Annotated[str, typer.Argument(help="routers, granularity, shared or balance.")],
    data: Annotated[Path, typer.Option(help="File or folder of text, one subfolder a domain.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the trainings; a study that was stopped goes on there.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="Training config to vary; a small one if left out.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer; learned from the text if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of each case.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time; one for each core if left out.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Train small models that differ in one thing, with several seeds, and compare them."""
    from rich.console import Console

    from moescope.cli.command import command_line
    from moescope.cli.progress import progress_bar
    from moescope.cli.study_drawing import draw
    from moescope.lab.routers import BASE, base_config
    from moescope.lab.study import run_study
    from moescope.machine import Machine

    overrides = {"data": {"source": data, "tokenizer": tokenizer}, "training": {"steps": steps}}
    base = base_config(config or BASE, overrides)
    with progress_bar("training steps") as progress:
        found = run_study(
            name,
            base,
            out,
            seeds=seeds,
            workers=workers or Machine.detect().cores,
            command=command_line(),
            progress=progress,
        )
    if as_json:
        print(found.to_json())
    else:
        draw(found, Console(highlight=False))
