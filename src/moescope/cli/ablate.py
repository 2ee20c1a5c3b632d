"""`moescope ablate`: what each domain loses without each expert."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def ablate(
    model: Annotated[str, typer.Argument(help='"tiny", a folder, a .gguf file or a Hub name.')],
    texts: Annotated[
        Path,
        typer.Argument(
            help="File or folder of text, one subfolder a domain; of a folder that holds train/ "
            "and held_out/, the latter is read."
        ),
    ],
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Try this layer's experts only, by its tensors' number (from 0)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Send every token to the expert instead.")
    ] = False,
    bytes_per_domain: Annotated[
        int,
        typer.Option(
            "--bytes", min=1, help="Most bytes of a domain; they are read once for each expert."
        ),
    ] = 20_000,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens read at once; if left out, as many as the model was trained on at once, "
            "but at most 512.",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the result into this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of drawing.")
    ] = False,
) -> None:
    """Switch experts off one at a time and measure what each domain's loss loses."""
    from dataclasses import replace

    from rich.console import Console

    from moescope.api import load
    from moescope.cli.ablation_drawing import draw
    from moescope.cli.command import command_line
    from moescope.cli.progress import progress_bar
    from moescope.scope.ablation import ablate as measure
    from moescope.scope.texts import labelled_text
    from moescope.text.split import TrainedText

    opened = load(model)
    text = labelled_text(texts, bytes_per_domain, [TrainedText.load(opened.path)])
    with progress_bar("experts") as progress:
        found = measure(
            opened.name,
            opened.network,
            opened.tokenizer,
            text.documents,
            layers=layer,
            force=force,
            window=window,
            progress=progress,
        )
    found = replace(found, command=command_line(), held_out=text.held_out)
    for note in text.notes():
        print(note, file=sys.stderr)
    if save is not None:
        found.save(save)
    if as_json:
        print(found.to_json())
    else:
        draw(found, Console(highlight=False))
