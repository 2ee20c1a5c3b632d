"""`moescope serve`: the OpenAI API over a model."""

from typing import Annotated

import typer

from moescope.cli.sampling import (
    Backend,
    ExpertMemory,
    Quantize,
    StreamExperts,
    streaming,
)


def serve(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help='"tiny", a folder, a .gguf file or a Hub name.')
    ] = "tiny",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 127.0.0.1 is this machine alone.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MOESCOPE_API_KEY", help="What every request must carry."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the API calls the model; else its own name.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Texts that are continued at a time; others wait.")
    ] = 8,
    backend: Backend = None,
    quantize: Quantize = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
) -> None:
    """Answer the OpenAI API: /v1/chat/completions, /v1/completions; and /metrics. Ctrl-C ends.

    What a request does not say of sampling is as the model's generation_config.json or GGUF file
    says, else as OpenAI has it: temperature 1.
    """
    from moescope.api import load
    from moescope.server.serving import serve_api

    serve_api(
        load(
            model,
            backend=backend,
            quantize=quantize,
            **streaming(stream_experts, expert_memory),
        ),
        host,
        port,
        lambda line: print(line, flush=True),
        name=name or model.rstrip("/").rpartition("/")[2],
        api_key=api_key,
        max_batch=max_batch,
    )
