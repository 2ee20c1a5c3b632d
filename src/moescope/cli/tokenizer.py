"""`moescope tokenizer`: learn a vocabulary from text."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Learn a vocabulary from text.")


@app.callback()
def tokenizer() -> None:
    """Learn a vocabulary from text."""


@app.command(epilog="Example: moescope tokenizer train my-text --vocab-size 16384 --out my-tokens")
def train(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Files or folders of text.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens to learn, up to 102400.")] = 16_384,
    sample_bytes: Annotated[
        int, typer.Option(help="Bytes to learn from, shared evenly among the domains.")
    ] = 30_000_000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object at the end.")
    ] = False,
) -> None:
    """Learn a byte-level BPE with DeepSeek's special tokens and chat form."""
    from moescope.text.tokenizer import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # native code would make Ctrl-C wait for its end
    learned = Tokenizer.train(data, vocab_size, sample_bytes=sample_bytes, progress=not as_json)
    learned.save(out)
    if as_json:
        print(json.dumps({"vocab_size": learned.vocab_size, "folder": str(out)}))
    else:
        print(f"{learned.vocab_size:,} tokens, saved in {out}")
