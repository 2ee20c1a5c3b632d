"""`moescope open`: the page that shows a model at work."""

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.sampling import (
    Backend,
    Device,
    ExpertMemory,
    Quantize,
    StreamExperts,
    streaming,
)


def open(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help='"tiny", a folder, a .gguf file or a Hub name.')
    ] = "tiny",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="The next free one is taken if it is busy.")
    ] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 127.0.0.1 is this machine alone.")
    ] = "127.0.0.1",
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page where there is a display.")
    ] = True,
    backend: Backend = None,
    quantize: Quantize = None,
    device: Device = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
    watch: Annotated[
        Path | None, typer.Option(help="Follow the training that runs in this folder, too.")
    ] = None,
) -> None:
    """Open the page: type a text and watch tokens, router and experts at work. Ctrl-C ends it."""
    from moescope.server.serving import serve
    from moescope.server.studio import Studio

    studio = Studio.open(
        model,
        watching=watch,
        backend=backend,
        quantize=quantize,
        device=device,
        **streaming(stream_experts, expert_memory),
    )
    serve(studio, host, port, lambda line: print(line, flush=True), browser=browser)
