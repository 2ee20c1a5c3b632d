"""Options that every verb which makes text has in common."""

from typing import Annotated, Any

import typer

ModelName = Annotated[str, typer.Option(help='"tiny", a folder, a .gguf file or a Hub name.')]
Backend = Annotated[
    str | None, typer.Option(help='"torch", or "cpu": native kernels on rounded weights.')
]
Quantize = Annotated[str | None, typer.Option(help='Weights of "cpu": "int8", "int4" or "bf16".')]
MaxTokens = Annotated[int, typer.Option(help="Tokens to make at most.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest; higher is livelier. This and the next four, if left out, are "
        "as the model's generation_config.json or GGUF file says, else 0 or without effect."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Choose among this many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest that sum to this.")]
MinP = Annotated[float | None, typer.Option(help="Least likelihood, as a share of the likeliest.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1, seen tokens come less often.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends it; may be given again.")]


def given(
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """Return what was given as fields of `SamplingParams`, checked before a model is loaded.

    Raises:
        UserError: an option's value has no meaning.
    """
    options: dict[str, Any] = {**locals(), "stop": tuple(stop or ())}
    fields = {name: value for name, value in options.items() if value is not None}

    from moescope.engine.sampling import SamplingParams

    SamplingParams(**fields)
    return fields
