"""Options that every verb which makes text has in common."""

from typing import Annotated, Any

import typer

ModelName = Annotated[str, typer.Option(help='"tiny", a folder, a .gguf file or a Hub name.')]
Backend = Annotated[
    str | None, typer.Option(help='"torch", or "cpu": native kernels on rounded weights.')
]
Quantize = Annotated[str | None, typer.Option(help='Weights of "cpu": "int8", "int4" or "bf16".')]
MaxTokens = Annotated[int, typer.Option(help="Tokens to make at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest; higher is livelier.")]
TopK = Annotated[int | None, typer.Option(help="Choose among this many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest that sum to this.")]
MinP = Annotated[float | None, typer.Option(help="Least likelihood, as a share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, seen tokens come less often.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends it; may be given again.")]


def given(
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """Return the options as the fields of `SamplingParams`, checked before a model is loaded.

    Raises:
        UserError: an option's value has no meaning.
    """
    fields: dict[str, Any] = {**locals(), "stop": tuple(stop or ())}

    from moescope.engine.sampling import SamplingParams

    SamplingParams(**fields)
    return fields
