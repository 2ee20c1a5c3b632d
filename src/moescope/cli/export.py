"""`moescope export`: a model as other engines open it."""

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help='"tiny", a folder, a .gguf file or a Hub name.')],
    to: Annotated[str, typer.Option(help="transformers, vllm or gguf.")],
    out: Annotated[Path, typer.Option(help="The folder, or a .gguf file; not there yet.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16; float32 for models of up to 500M parameters if left out, "
            "and above it the type they are stored in."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model so that another engine opens it.

    GGUF with fewer bits a weight is written by `moescope quantize`.
    """
    from moescope.api import locate
    from moescope.cli.progress import progress_bar
    from moescope.export import export as write
    from moescope.lab.units import of_bytes

    with progress_bar("writing") as tell:
        made = write(locate(model), to, out, dtype=dtype, tell=tell)
    if as_json:
        print(json.dumps({**vars(made), "path": str(made.path)}, ensure_ascii=False))
        return
    print(f"{made.path}: {of_bytes(made.bytes)} of {made.dtype}")
    if made.note is not None:
        print(made.note)
    print(f"open it with: {made.command}")
