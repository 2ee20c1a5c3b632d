"""`moescope train`: train a model as a TOML file says."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from moescope.errors import UserError


def _show_fields(wanted: bool) -> None:
    if wanted:
        from moescope.training.fields import describe_fields

        typer.echo(describe_fields(), nl=False)
        raise typer.Exit


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml", help="What to train, and how: --fields lists all it can hold."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints.")],
    data: Annotated[
        Path | None, typer.Option(help="File or folder of text, one subfolder a domain.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer; learned from the text if left out.")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(help='Folder of a model whose weights the training starts from, or "tiny".'),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0 for none.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first weights and the order of the text.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")
    ] = False,
    from_step: Annotated[
        int | None,
        typer.Option(help="Go back to this step's checkpoint in OUT and continue from there."),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="data=N,expert=M",
            help="Over how many of torchrun's processes the training is dealt.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda", help="What computes; a GPU where there is one."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the training on a page while it runs.")
    ] = False,
    _fields: Annotated[
        bool,
        typer.Option(
            "--fields",
            callback=_show_fields,
            is_eager=True,
            help="List all fields of CONFIG.toml, and exit.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object at the end.")
    ] = False,
) -> None:
    """Train a model. Ctrl-C saves a checkpoint; --resume continues from it, bit for bit."""
    from moescope.training.config import TrainConfig
    from moescope.training.parallel.ranks import is_first_process, one_of_all_says
    from moescope.training.trainer import train as run_training

    stream = sys.stderr if as_json else sys.stdout
    with one_of_all_says():
        settings = TrainConfig.from_file(
            config,
            {
                "start": {"model": start_from},
                "data": {"source": data, "tokenizer": tokenizer},
                "training": {"steps": steps, "seed": seed, "device": device},
                "checkpoints": {"every": checkpoint_every},
                "parallel": _ranks(parallel),
            },
        )
        with _page(out, stream) if watch and is_first_process() else nullcontext():
            summary = run_training(settings, out, resume=resume, from_step=from_step, stream=stream)
    if summary is None:
        raise typer.Exit(130)
    if as_json and is_first_process():
        print(json.dumps(summary, ensure_ascii=False))


def _ranks(text: str | None) -> dict[str, Any]:
    """Read `data=1,expert=2`; numbers are checked where the config's are."""
    parts = [] if text is None else [part.partition("=") for part in text.split(",")]
    if any(name not in ("data", "expert") or not number for name, _, number in parts):
        raise UserError(
            f"--parallel {text} says no numbers of ranks; write it as --parallel data=2,expert=1"
        )
    return {name: number for name, _, number in parts}


def _page(out: Path, stream: TextIO) -> AbstractContextManager[None]:
    from moescope.server.serving import shown_beside

    return shown_beside(out, lambda line: print(line, file=stream, flush=True))
