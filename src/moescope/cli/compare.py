"""`moescope compare`: models side by side."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moescope.lab.compare import Entrant


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...]",
            help='Models: "tiny", folders, .gguf files or Hub names. Or recipes to train first: '
            '"moe", its twin "dense", or TOML files.',
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of text, one subfolder a domain; of a folder that holds train/ "
            "and held_out/, the latter is read. The --data, if left out."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Recipes: text to train on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Recipes: folder for the trainings, which go on there.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Recipes: folder of a tokenizer; else one is learned.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Recipes: optimizer steps.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Recipes: trainings of each.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Recipes: trainings at a time; one for each core.")
    ] = None,
    bytes_per_domain: Annotated[
        int, typer.Option("--bytes", min=1, help="Most bytes of text that are read of a domain.")
    ] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model is timed.")] = 10,
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
    """Compare models on the same text: how good, how fast, how costly, and how sure that is."""
    from dataclasses import replace

    from rich.console import Console

    from moescope.cli.command import command_line
    from moescope.cli.comparison_drawing import draw
    from moescope.errors import UserError
    from moescope.lab.compare import compare as measure
    from moescope.lab.twins import is_recipe
    from moescope.scope.texts import labelled_text
    from moescope.text.split import TrainedText

    if len(models) < 2:
        raise typer.BadParameter("give two models or more")
    recipes = [name for name in models if is_recipe(name)]
    if recipes and (data is None or out is None):
        raise UserError(f"{recipes[0]} is a recipe; give --data to train on, and --out for models")
    source = text or data
    if source is None:
        raise typer.BadParameter("missing option '--text'")
    trained: dict[str, list[Path]] = {}
    if data is not None and out is not None:
        overrides = {"data": {"source": data, "tokenizer": tokenizer}, "training": {"steps": steps}}
        trained = _train(recipes, overrides, out, seeds, workers)
    entrants = [_entrant(name, trained) for name in models]
    remembered = [TrainedText.load(entrant.folder) for entrant in entrants]
    texts = labelled_text(source, bytes_per_domain, remembered)
    with Console(stderr=True).status("reading") as status:
        found = measure(
            entrants, texts.documents, rounds=rounds, window=window, progress=status.update
        )
    found = replace(found, command=command_line(), held_out=texts.held_out)
    for note in texts.notes():
        print(note, file=sys.stderr)
    if save is not None:
        found.save(save)
    if as_json:
        print(found.to_json())
    else:
        draw(found, Console(highlight=False))


def _train(
    recipes: list[str],
    overrides: dict[str, dict[str, Any]],
    out: Path,
    seeds: int,
    workers: int | None,
) -> dict[str, list[Path]]:
    """Train the recipes; return the folders of each one's trainings."""
    from moescope.cli.progress import progress_bar
    from moescope.lab.twins import train_recipes
    from moescope.machine import Machine

    if not recipes:
        return {}
    with progress_bar("training steps") as progress:
        return train_recipes(
            recipes,
            overrides,
            out,
            seeds=seeds,
            workers=workers or Machine.detect().cores,
            progress=progress,
        )


def _entrant(name: str, trained: dict[str, list[Path]]) -> "Entrant":
    from moescope.api import load
    from moescope.lab.compare import Entrant
    from moescope.lab.twins import is_recipe

    if not is_recipe(name):
        model = load(name)
        return Entrant(name, model.path or Path(name), model.engine)
    folder, *others = trained[Path(name).stem]
    siblings = [load(other).engine for other in others]
    return Entrant(Path(name).stem, folder, load(folder).engine, siblings)
