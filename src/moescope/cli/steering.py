"""Options of every verb that can let the routers decide otherwise."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.errors import UserError

if TYPE_CHECKING:
    from moescope.api import Model

NumExpertsPerTok = Annotated[int | None, typer.Option(help="Experts that a token visits.")]
DisableExpert = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:ID", help="Switch an expert off, by its tensors' numbers; may be repeated."
    ),
]
ForceExpert = Annotated[
    list[str] | None,
    typer.Option(metavar="LAYER:ID", help="Send every token to an expert; may be repeated."),
]
RouterRule = Annotated[
    str | None, typer.Option(help="Choose by softmax, sigmoid, relu or a random map instead.")
]
RouterNoise = Annotated[float, typer.Option(help="Noise on the router logits (its deviation).")]


def steer(
    model: "Model",
    num_experts_per_tok: int | None,
    disable_expert: list[str] | None,
    force_expert: list[str] | None,
    router_rule: str | None,
    router_noise: float,
) -> "Model":
    """Return the model as the options change it.

    Raises:
        UserError: an option names what the model lacks, or has no meaning.
    """
    changes: dict[str, Any] = {
        "num_experts_per_tok": num_experts_per_tok,
        "disabled": [_expert(text) for text in disable_expert or ()],
        "forced": [_expert(text) for text in force_expert or ()],
        "rule": router_rule,
        "noise": router_noise,
    }
    return model.steer(**changes)


def _expert(text: str) -> tuple[int, int]:
    """Read `LAYER:ID`."""
    layer, _, expert = text.partition(":")
    if not (layer.isascii() and layer.isdigit() and expert.isascii() and expert.isdigit()):
        raise UserError(f"{text!r} names no expert; write LAYER:ID, for example 3:17")
    return int(layer), int(expert)
