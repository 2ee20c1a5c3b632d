"""`moescope quantize`: a model with fewer bits a weight, in a file of its own."""

import json
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(help='"tiny", a folder, a .gguf file or a Hub name.')],
    to: Annotated[
        str,
        typer.Option(
            help="For a .gguf file f32, bf16, f16, q8_0, q6_k, q5_k_m, q5_1, q5_0, q4_k_m, q4_1, "
            "q4_0, iq4_nl or mxfp4_moe; for a folder bf16 or int8."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .gguf file, or a folder; not there yet.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Round a model's weights and write it anew, with all that belongs to it."""
    from moescope.api import locate
    from moescope.cli.progress import progress_bar
    from moescope.errors import counted
    from moescope.lab.units import of_bytes
    from moescope.quantization import quantize as write

    with progress_bar("rounding") as tell:
        made = write(locate(model), to.lower(), out, tell)
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False))
        return
    print(f"{made.path}: {of_bytes(made.bytes)}, {made.bits_per_weight:.2f} bits a weight")
    if made.unfit:
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))
        print(
            f"the rows of {counted(made.unfit, 'tensor')} are no multiple of 256 (or 32) columns, "
            f"and have the next wider type, as llama.cpp gives them: {types}"
        )
