"""`moescope compare`: models side by side."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...]", help='Models: "tiny", folders, .gguf files or Hub names.'
        ),
    ],
    text: Annotated[
        Path,
        typer.Option(
            help="File or folder of text, one subfolder a domain; of a folder that holds train/ "
            "and held_out/, the latter is read."
        ),
    ],
    bytes_per_domain: Annotated[
        int, typer.Option("--bytes", min=1, help="Most bytes of text that are read of a domain.")
    ] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model is timed.")] = 10,
    save: Annotated[Path | None, typer.Option(help="Also write the result into this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of drawing.")
    ] = False,
) -> None:
    """Compare models on the same text: how good, how fast, how costly, and how sure that is."""
    from dataclasses import replace

    from rich.console import Console

    from moescope.api import load, locate
    from moescope.cli.command import command_line
    from moescope.cli.comparison_drawing import draw
    from moescope.lab.compare import Entrant
    from moescope.lab.compare import compare as measure
    from moescope.scope.texts import labelled_documents

    if len(models) < 2:
        raise typer.BadParameter("give two models or more")
    documents = labelled_documents(text, bytes_per_domain)
    entrants = [Entrant(name, locate(name), load(name).engine) for name in models]
    with Console(stderr=True).status("reading") as status:
        found = measure(entrants, documents, rounds=rounds, progress=status.update)
    found = replace(found, command=command_line())
    if save is not None:
        found.save(save)
    if as_json:
        print(found.to_json())
    else:
        draw(found, Console(highlight=False))
