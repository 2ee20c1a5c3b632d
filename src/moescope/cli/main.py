"""The `moescope` command: its verbs, and how it ends.

A verb's module imports nothing heavy at its top, so that help appears at once. Exit codes: 0,
2 for a mistake the user can mend (one sentence on stderr), 130 when interrupted.
"""

import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from moescope.cli import command, tokenizer
from moescope.cli.ablate import ablate
from moescope.cli.bench import bench
from moescope.cli.chat import chat
from moescope.cli.compare import compare
from moescope.cli.doctor import doctor
from moescope.cli.explain import explain
from moescope.cli.export import export
from moescope.cli.generate import generate
from moescope.cli.open import open
from moescope.cli.plan import plan
from moescope.cli.quantize import quantize
from moescope.cli.report import report
from moescope.cli.sampling import tell_experts
from moescope.cli.serve import serve
from moescope.cli.specialize import specialize
from moescope.cli.study import study
from moescope.cli.train import train
from moescope.errors import UserError

app = typer.Typer(
    name="moescope",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog='Example: moescope explain "床前明月光"',
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moescope {version('moescope')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def moescope(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train, run and see into mixture-of-experts language models of the DeepSeek kind.

    Without a command, the page opens: `moescope open`.
    """
    if context.invoked_subcommand is None:
        open()


for verb, example in (
    (open, "moescope open my-model --port 8080"),
    (generate, 'moescope generate "春眠不觉晓，" --max-tokens 24'),
    (serve, "moescope serve my-model --backend cpu --port 8080"),
    (bench, "moescope bench http://127.0.0.1:8000 --max-concurrency 8"),
    (chat, 'moescope chat "What is 17 + 25?"'),
    (explain, 'moescope explain "It is a truth universally acknowledged"'),
    (plan, "moescope plan deepseek-v3"),
    (export, "moescope export my-model --to vllm --out my-model-vllm"),
    (train, "moescope train recipes/smoke.toml --data my-text --out my-model"),
    (specialize, "moescope specialize tiny my-text"),
    (ablate, "moescope ablate tiny my-text --layer 3"),
    (compare, "moescope compare my-moe my-dense --text my-text"),
    (study, "moescope study routers --data my-text --out my-study"),
    (quantize, "moescope quantize my-model --to q4_k_m --out my-model.gguf"),
    (report, "moescope report found.json my-study/study.json --out my-report"),
    (doctor, "moescope doctor --json"),
):
    app.command(epilog=f"Example: {example}")(verb)
app.add_typer(tokenizer.app, name="tokenizer")


def main() -> None:
    """Run the command line and exit the process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    command.arguments.set(tuple(arguments))
    command.streams_experts.set(False)
    try:
        code = app(arguments, prog_name="moescope", standalone_mode=False)
    except typer.Abort:
        return 130
    except (UserError, typer.TyperException) as error:
        print(f"moescope: {_sentence(error)}", file=sys.stderr)
        return 2
    if command.streams_experts.get():
        tell_experts()
    return code or 0


def _sentence(error: UserError | typer.TyperException) -> str:
    if isinstance(error, UserError):
        return str(error)
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "moescope"
    return f"{message[0].lower()}{message[1:]} (`{command} -h` shows how)"
