"""Put a finished training into the box: `python recipes/tiny/pack.py RUN CORPUS`.

Stores the weights as int8 with one scale a row, with their tokenizer, their training's history, and
what `measure.py` finds. A model that learned to answer after it was trained on text brings the
folder of that training too (`--pretrained`): its history is kept, and the next sitting reads on
from there. `--way 0.5` stores the weights half way between the two, which keep most of both
(Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from measure import measure

from moescope.catalog import BOX
from moescope.checkpoint import load_model, save_weights
from moescope.errors import UserError
from moescope.files import read_object
from moescope.scope.history import FILE as HISTORY, History, history_of
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.start import READING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument(
        "--pretrained", type=Path, help="the training on text, where RUN is another"
    )
    parser.add_argument("--way", type=float, default=1.0, help="from the training on text to RUN")
    parser.add_argument("--box", type=Path, default=BOX / "tiny")
    arguments = parser.parse_args()
    try:
        pack(arguments.run, arguments.pretrained or arguments.run, arguments.way, arguments.box)
        measure(arguments.box, arguments.corpus)
    except UserError as error:
        sys.exit(str(error))
    size = sum(file.stat().st_size for file in arguments.box.iterdir())
    print(f"{size / 1e6:.1f} MB in {arguments.box}")


def pack(run: Path, pretrained: Path, way: float, box: Path) -> None:
    """Store the model in `run`, which the training `pretrained` read the text with.

    Args:
        run: a training.
        pretrained: the one that it started from, or itself.
        way: how far to go from the weights of `pretrained` to those of `run`.
        box: where to.

    Raises:
        UserError: a training is not there or not whole, or did not go on from what is in `box`.
    """
    history = joined_history(pretrained, box)
    model = load_model(pretrained, dtype=torch.float32)
    end = load_model(run, dtype=torch.float32).state_dict()
    model.load_state_dict({n: torch.lerp(w, end[n], way) for n, w in model.state_dict().items()})
    save_weights(model, box, dtype=torch.int8)
    Tokenizer.load(run).save(box)
    remembered = TrainedText.load(pretrained)
    if remembered is not None:
        remembered.save(box)
    shutil.copy(pretrained / READING, box / READING)
    history.save(box / HISTORY)


def joined_history(pretrained: Path, box: Path) -> History:
    """Return the history of a training, after that of the model in `box` that it went on from.

    Raises:
        UserError: there is no training, or it went on from another one.
    """
    history = history_of(pretrained)
    summary = read_object(pretrained / "training.json")
    if summary.get("config", {}).get("start", {}).get("model") is None:
        return history
    packed = History.from_file(box / HISTORY)
    tokens = read_object(pretrained / READING)["tokens"]
    known = read_object(box / READING)["tokens"] if (box / READING).is_file() else 0
    last = history.rows[-1]
    if known == tokens and replace(packed.rows[-1], step=last.step) == last:
        return packed  # as it was before it learned to answer
    before = tokens - summary["tokens"]
    if known != before:
        raise UserError(
            f"{pretrained} went on after {before:,} tokens, and the model in {box} has read "
            f"{known:,}; pack each sitting, in order"
        )
    return history.after(packed)


if __name__ == "__main__":
    main()
