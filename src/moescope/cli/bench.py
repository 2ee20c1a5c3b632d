"""`moescope bench URL`: load on any server of OpenAI's API."""

import json
from typing import Annotated, Any

import typer

TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between pieces",
    "e2el": "whole answer",
}


def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server's, as http://127.0.0.1:8000.")
    ],
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests in all; 64 where no --duration is given.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds in which requests begin.")
    ] = None,
    random_input_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt, made of random words.")
    ] = 128,
    random_output_len: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer at most.")
    ] = 64,
    hang_up: Annotated[
        float, typer.Option(min=0, max=1, help="Share of clients who leave in the middle.")
    ] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Have every answer take its full length.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, and of who leaves.")] = 0,
    endpoint: Annotated[str, typer.Option(help="Or /v1/chat/completions.")] = "/v1/completions",
    model: Annotated[
        str | None, typer.Option(help="As the server calls it; else the first that it lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOESCOPE_API_KEY", help="Sent with every request.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put load on any server of OpenAI's API; tell its times and tokens a second.

    Options and numbers have the names of vLLM's `bench serve`.
    """
    from moescope.cli.progress import progress_bar
    from moescope.lab.load import Load, Server, put

    if num_prompts is None and duration is None:
        num_prompts = 64
    load = Load(
        max_concurrency=max_concurrency,
        num_prompts=num_prompts,
        duration=duration,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        hang_up=hang_up,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
    )
    with progress_bar("asking" if num_prompts else "seconds") as tell:
        found = put(load, Server(url, endpoint, model, api_key), tell)
    if as_json:
        print(json.dumps(found))
    else:
        _draw(found)


def _draw(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = Table.grid(padding=(0, 2))
    counts.add_column(style="bold")
    counts.add_column(justify="right")
    for name, meaning in (
        ("completed", "answers"),
        ("hung_up", "clients who left"),
        ("failed", "failed"),
        ("duration", "seconds"),
        ("request_throughput", "answers a second"),
        ("output_throughput", "tokens a second, made"),
        ("total_token_throughput", "tokens a second, read and made"),
    ):
        value = found[name]
        counts.add_row(meaning, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    times = Table("milliseconds", "median", "mean", "p99")
    for column in times.columns[1:]:
        column.justify = "right"
    for name, meaning in TIMES.items():
        values = (found[f"{how}_{name}_ms"] for how in ("median", "mean", "p99"))
        times.add_row(meaning, *("-" if value is None else f"{value:,.1f}" for value in values))
    console = Console()
    console.print(counts, times)
    for error in found["errors"]:
        console.print(f"failed: {error}", markup=False)
