"""Options that every verb which makes text has in common."""

from typing import Annotated, Any

import typer

from moescope.cli import command

ModelName = Annotated[str, typer.Option(help='"tiny", a folder, a .gguf file or a Hub name.')]
Backend = Annotated[
    str | None, typer.Option(help='"torch", or "cpu": native kernels, as for GGUF.')
]
Quantize = Annotated[str | None, typer.Option(help='Round to "int8", "int4" or "bf16", for "cpu".')]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help='What "torch" computes on; else the CPU.')
]
StreamExperts = Annotated[
    bool,
    typer.Option(
        "--stream-experts", help="Leave experts on the disk; read those that tokens visit."
    ),
]
ExpertMemory = Annotated[
    float | None,
    typer.Option(min=0, help="GB of streamed experts in memory; else most of what is free."),
]
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
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(help="Above 0, tokens that were made come less often, the more they were."),
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Above 0, tokens that were made come less often.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends it; may be given again.")]


def streaming(stream_experts: bool, expert_memory: float | None) -> dict[str, Any]:
    """Return the two options as `moescope.load` takes them.

    Raises:
        UserError: a limit is given, but nothing is streamed.
    """
    from moescope.errors import UserError

    if expert_memory is not None and not stream_experts:
        raise UserError("--expert-memory limits streamed experts; add --stream-experts")
    command.streams_experts.set(stream_experts)
    limit = None if expert_memory is None else int(expert_memory * 1e9)
    return {"stream_experts": stream_experts, "expert_memory": limit}


def tell_experts() -> None:
    """Say on standard error how often streamed experts were in memory, and what was read."""
    import sys

    from moescope.kernels.cpu import expert_counts
    from moescope.lab.units import of_bytes

    counts = expert_counts()
    print(
        f"experts: {counts.hits / max(counts.visits, 1):.1%} of {counts.visits:,} visits were to "
        f"those in memory; {of_bytes(counts.bytes_read)} read, {of_bytes(counts.held)} of "
        f"{of_bytes(counts.limit)} held",
        file=sys.stderr,
    )


def given(
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    frequency_penalty: float | None,
    presence_penalty: float | None,
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
