"""`moescope specialize`: which experts serve which domain."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def specialize(
    model: Annotated[str, typer.Argument(help='"tiny", a folder, a .gguf file or a Hub name.')],
    texts: Annotated[
        Path,
        typer.Argument(
            help="File or folder of text, one subfolder a domain; of a folder that holds train/ "
            "and held_out/, the latter is read."
        ),
    ],
    bytes_per_domain: Annotated[
        int, typer.Option("--bytes", min=1, help="Most bytes of text that are read of a domain.")
    ] = 100_000,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens read at once; if left out, as many as the model was trained on at once, "
            "but at most 512.",
        ),
    ] = None,
    cards: Annotated[
        bool,
        typer.Option("--cards", help="Draw a card of each expert instead of the layers' maps."),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Also write the result into this file; as specialization.json in "
            "the model's folder, or FILE.specialization.json beside FILE.gguf, the page shows it.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of drawing.")
    ] = False,
) -> None:
    """Show which experts serve which domain, and which tokens each receives.

    Labels are Chinese where most of the experts' tokens are.
    """
    from dataclasses import replace

    from rich.console import Console

    from moescope.api import load
    from moescope.cli.command import command_line
    from moescope.cli.progress import progress_bar
    from moescope.cli.specialization_drawing import draw, draw_cards
    from moescope.scope.specialization import specialize as measure
    from moescope.scope.texts import labelled_text
    from moescope.text.split import TrainedText

    opened = load(model)
    text = labelled_text(texts, bytes_per_domain, [TrainedText.load(opened.path)])
    with progress_bar("reading") as progress:
        found = measure(
            opened.name,
            opened.network,
            opened.tokenizer,
            text.documents,
            progress,
            window=window,
        )
    found = replace(found, command=command_line(), held_out=text.held_out)
    for note in text.notes():
        print(note, file=sys.stderr)
    if save is not None:
        found.save(save)
    if as_json:
        print(found.to_json())
    else:
        (draw_cards if cards else draw)(found, Console(highlight=False))
