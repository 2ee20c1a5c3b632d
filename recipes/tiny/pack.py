"""Put a finished training into the package: `python recipes/tiny/pack.py MOE_OUT CORPUS`.

Stores the weights as int8 with one scale a row, with their tokenizer and which experts serve which
domain of the held-out text, and prints what rounding the weights costs in held-out loss.
"""

import argparse
import shutil
from pathlib import Path

import torch

from moescope.catalog import BOX
from moescope.checkpoint import load_model, save_weights
from moescope.scope.history import FILE as HISTORY
from moescope.scope.history import history_of
from moescope.scope.specialization import specialize
from moescope.scope.texts import labelled_text
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.data import build_shards
from moescope.training.evaluation import evaluate
from moescope.training.start import READING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("moe_out", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--box", type=Path, default=BOX / "tiny")
    arguments = parser.parse_args()

    config = TrainConfig.from_file(Path(__file__).with_name("moe.toml"), {})
    tokenizer = Tokenizer.load(arguments.moe_out)
    index = build_shards(arguments.corpus, arguments.moe_out / "shards", tokenizer, held_out=True)
    whole = load_model(arguments.moe_out, dtype=torch.float32)
    save_weights(whole, arguments.box, dtype=torch.int8)
    tokenizer.save(arguments.box)
    reading = arguments.moe_out / READING
    if reading.is_file():  # the next sitting starts from what is packed
        shutil.copy(reading, arguments.box / READING)
    remembered = TrainedText.load(arguments.moe_out)
    if remembered is not None:
        remembered.save(arguments.box)
    packed = load_model(arguments.box, dtype=torch.float32)
    before, after = (
        evaluate(
            model,
            index,
            batch_size=config.training.rows_at_a_time,
            sequence_length=config.data.sequence_length,
            max_tokens=config.evaluation.tokens,
        )
        for model in (whole, packed)
    )
    for domain, loss in before.loss.items():
        print(f"{domain:12} {loss:.4f} -> {after.loss[domain]:.4f} nats a token")
    if packed.config.n_routed_experts is not None:
        text = labelled_text(arguments.corpus, trained=[remembered])
        found = specialize(arguments.box.name, packed, tokenizer, text.documents)
        found.save(arguments.box / "specialization.json")
    history_of(arguments.moe_out).save(arguments.box / HISTORY)
    size = sum(file.stat().st_size for file in arguments.box.iterdir())
    print(f"{size / 1e6:.1f} MB in {arguments.box}")


if __name__ == "__main__":
    main()
