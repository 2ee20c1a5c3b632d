"""What a packed model does with the held-out text: `python recipes/tiny/measure.py BOX CORPUS`.

Writes each domain's loss into its training's history, and, of a mixture, which experts serve which
domain. Models that stand beside each other in the box are measured on the same text, also where
they were trained when there was less of it.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from moescope.checkpoint import load_model
from moescope.errors import UserError
from moescope.scope.history import FILE as HISTORY, History
from moescope.scope.saved import rounded
from moescope.scope.specialization import specialize
from moescope.scope.texts import labelled_text
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.data import build_shards
from moescope.training.evaluation import Evaluation, evaluate
from moescope.training.parallel.ranks import Ranks

WINDOW, BATCH, TOKENS = 512, 16, 32768
"""Tokens read at once, which each model in the box was trained on at least; rows; of a domain."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("box", type=Path)
    parser.add_argument("corpus", type=Path)
    arguments = parser.parse_args()
    try:
        measure(arguments.box, arguments.corpus)
    except UserError as error:
        sys.exit(str(error))


def measure(box: Path, corpus: Path) -> None:
    """Measure the model in `box` anew, and print its losses."""
    found = held_out(box, corpus)
    history = History.from_file(box / HISTORY)
    loss = {domain: rounded(value) for domain, value in found.loss.items()}
    replace(history, held_out=loss).save(box / HISTORY)
    for domain, value in found.loss.items():
        print(
            f"{domain:14} {value:.4f} nats a token, {found.bits_per_byte[domain]:.4f} bits a byte"
        )
    model = load_model(box, dtype=torch.float32)
    if model.config.n_routed_experts is not None:
        text = labelled_text(corpus, trained=[TrainedText.load(box)])
        served = specialize(box.name, model, Tokenizer.load(box), text.documents)
        served.save(box / "specialization.json")


def held_out(model: Path, corpus: Path) -> Evaluation:
    """Read the held-out text of every domain with the model in a folder."""
    with tempfile.TemporaryDirectory() as shards:
        index = build_shards(corpus, Path(shards), Tokenizer.load(model), held_out=True)
        return evaluate(
            load_model(model, dtype=torch.float32),
            index,
            batch_size=BATCH,
            sequence_length=WINDOW,
            max_tokens=TOKENS,
            ranks=Ranks(),
        )


if __name__ == "__main__":
    main()
