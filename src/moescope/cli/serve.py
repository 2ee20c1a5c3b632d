"""`moescope serve`: the APIs of OpenAI, Anthropic and Ollama over a model."""

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
    metrics_key: Annotated[
        str | None,
        typer.Option(envvar="MOESCOPE_METRICS_KEY", help="Opens /metrics, and nothing else."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="The page lists what is asked, to all who may ask."),
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Need no key beyond this machine.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name to answer to, as host.docker.internal; may be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may ask, as https://example.org, or *."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests once the server ends.")
    ] = 30.0,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which a request must have come.")
    ] = 10.0,
    name: Annotated[
        str | None, typer.Option(help="What the API calls the model; else its own name.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Texts that are continued at a time; others wait.")
    ] = 8,
    cache_memory: Annotated[
        float | None,
        typer.Option(min=0, help="GB that all texts may take; else half of what is free."),
    ] = None,
    backend: Backend = None,
    quantize: Quantize = None,
    device: Device = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
) -> None:
    """Answer the APIs of OpenAI, Anthropic and Ollama; /docs describes them. Ctrl-C ends.

    At /page/ is the page of `moescope open` over the same model.

    What a request does not say of sampling is as the model's generation_config.json or GGUF file
    says, else as OpenAI has it: temperature 1.
    """
    from moescope.api import load
    from moescope.server.apis import Access
    from moescope.server.serving import serve_api

    serve_api(
        load(
            model,
            backend=backend,
            quantize=quantize,
            device=device,
            **streaming(stream_experts, expert_memory),
        ),
        host,
        port,
        lambda line: print(line, flush=True),
        name=name or model.rstrip("/").rpartition("/")[2],
        access=Access(api_key, metrics_key, allow_host or (), allow_origin or (), patience),
        insecure=insecure,
        grace=grace,
        max_batch=max_batch,
        cache_bytes=None if cache_memory is None else int(cache_memory * 1e9),
        watch=watch,
    )
