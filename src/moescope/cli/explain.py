"""`moescope explain`: what happens to each token of a text, drawn in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli.sampling import (
    Backend,
    Device,
    ExpertMemory,
    Quantize,
    StreamExperts,
    streaming,
)
from moescope.cli.steering import (
    DisableExpert,
    ForceExpert,
    NumExpertsPerTok,
    RouterNoise,
    RouterRule,
    steer,
)
from moescope.errors import UserError

if TYPE_CHECKING:
    from moescope.api import Model


def explain(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text; asked for if left out.")
    ] = None,
    model: Annotated[
        str, typer.Option(help='"tiny", a folder, a .gguf file or a Hub name.')
    ] = "tiny",
    backend: Backend = None,
    quantize: Quantize = None,
    device: Device = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to continue the text by.")] = 12,
    save: Annotated[
        Path | None, typer.Option(help="Also write the whole trace into this JSON file.")
    ] = None,
    num_experts_per_tok: NumExpertsPerTok = None,
    disable_expert: DisableExpert = None,
    force_expert: ForceExpert = None,
    router_rule: RouterRule = None,
    router_noise: RouterNoise = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the trace as JSON instead of drawing it.")
    ] = False,
) -> None:
    """Draw which experts work on each token, and what the model makes of the text.

    Labels are Chinese where the prompt is.
    """
    from moescope.api import load

    if prompt is None and as_json:
        raise typer.BadParameter("--json needs a PROMPT")
    opened = steer(
        load(
            model,
            backend=backend,
            quantize=quantize,
            device=device,
            **streaming(stream_experts, expert_memory),
        ),
        num_experts_per_tok,
        disable_expert,
        force_expert,
        router_rule,
        router_noise,
    )
    if prompt is not None:
        _show(opened, prompt, max_tokens, save, as_json)
        return
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        try:
            _show(opened, line, max_tokens, save, as_json)
        except UserError as error:
            print(f"moescope: {error}", file=sys.stderr)


def _show(model: "Model", prompt: str, max_tokens: int, save: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from moescope.cli.drawing import draw

    trace = model.trace(prompt, max_tokens)
    if save is not None:
        trace.save(save)
    if as_json:
        print(trace.to_json())
    else:
        draw(trace, model.tokenizer, Console(highlight=False))


def _ask() -> str | None:
    """Return a line from standard input; None at its end or at Ctrl-C."""
    if sys.stdin.isatty():
        print("\nText / 文字 (Ctrl-D ends / 结束)")
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None
