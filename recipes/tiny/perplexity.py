"""What rounding costs: `python recipes/tiny/perplexity.py RUN CORPUS`.

RUN is the folder of a training. The held-out text of every domain is read with the weights as
trained (bf16, PyTorch), and with int8 and int4 weights by the native kernels, which round
activations too. Printed: perplexity a token, and by how much it rises; the 95 % interval is over
passages, the same for each model. As a measure of what is noise, bf16 is also held to the same
weights in float32. Reading a text and writing one use different kernels, so the beginnings of some
passages are also read token by token.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import moescope
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.scope.losses import document_losses
from moescope.scope.resampling import rate_interval
from moescope.scope.texts import BYTES_PER_DOMAIN, encode, labelled_text
from moescope.text.split import TrainedText

MODELS = {
    "bf16": {"dtype": "bfloat16", "backend": "torch"},
    "float32": {"dtype": "float32", "backend": "torch"},
    "int8": {"backend": "cpu", "quantize": "int8"},
    "int4": {"backend": "cpu", "quantize": "int4"},
}
STEPPING = ("int8", "int4")
STEPPED_PASSAGES, STEPPED_TOKENS = 12, 100
"""Of each domain, and of each passage."""
GOALS = {"int8": 0.005, "int4": 0.03}
"""How much of bf16's perplexity each may add."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--bytes", type=int, default=BYTES_PER_DOMAIN, help="of each domain")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()

    remembered = [TrainedText.load(arguments.run)]
    documents = labelled_text(arguments.corpus, arguments.bytes, remembered).documents
    domains = np.array([document.domain for document in documents])
    within = {str(domain): domains == domain for domain in np.unique(domains)}
    first = np.concatenate(
        [np.flatnonzero(chosen)[:STEPPED_PASSAGES] for chosen in within.values()]
    )
    within["all"] = np.ones(len(domains), dtype=bool)
    nats: dict[str, np.ndarray] = {}
    begun: dict[str, np.ndarray] = {}
    for name, options in MODELS.items():
        model = moescope.load(arguments.run, **options)
        encoded = encode(model.tokenizer, documents)
        nats[name] = document_losses(model.network, encoded)
        begun[name] = stepped_losses(model.network, [encoded[i] for i in first], name in STEPPING)
        tokens = np.array([len(ids) - 1 for ids in encoded])
    figures = {
        domain: {name: _figures(nats[name], nats["bf16"], tokens, chosen) for name in MODELS}
        for domain, chosen in within.items()
    }
    tokens = np.minimum(tokens[first], STEPPED_TOKENS)
    everywhere = np.ones(len(first), dtype=bool)
    figures["token by token"] = {
        name: _figures(begun[name], begun["bf16"], tokens, everywhere) for name in MODELS
    }
    _print(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def stepped_losses(model: CausalLM, encoded: list[list[int]], one_by_one: bool) -> np.ndarray:
    """Sum the nats of each passage's first tokens, `(passages,)`.

    Args:
        model: reads.
        encoded: ids of each passage.
        one_by_one: whether each token is read by itself, as when a text is written.
    """
    losses = np.zeros(len(encoded))
    for at, ids in enumerate(encoded):
        ids = torch.tensor(ids[: STEPPED_TOKENS + 1])
        inputs, cache = ids[:-1], Cache()
        places = torch.arange(len(inputs))
        pieces = range(len(inputs)) if one_by_one else [slice(None)]
        logits = [
            model.logits(model(inputs[i].reshape(1, -1), places[i].reshape(1, -1), cache)[0])
            for i in pieces
        ]
        losses[at] = F.cross_entropy(torch.cat(logits), ids[1:], reduction="sum")
    return losses


def _figures(
    nats: np.ndarray, baseline: np.ndarray, tokens: np.ndarray, within: np.ndarray
) -> dict[str, float]:
    """Perplexity, and how much higher it is than the baseline's, with the interval's ends."""
    rise = rate_interval((nats - baseline)[within], tokens[within])
    return {
        "perplexity": math.exp(nats[within].sum() / tokens[within].sum()),
        "rise": math.expm1(rise.value),
        "low": math.expm1(rise.low),
        "high": math.expm1(rise.high),
    }


def _print(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("perplexity", *MODELS)
    for domain, row in figures.items():
        cells = [f"{row['bf16']['perplexity']:.3f}"]
        for name in list(MODELS)[1:]:
            found = row[name]
            interval = f"{found['low']:+.2%} to {found['high']:+.2%}"
            cells.append(f"{found['perplexity']:.3f}  {found['rise']:+.2%} ({interval})")
        table.add_row(domain, *cells)
    Console(width=140).print(table)
    for name, goal in GOALS.items():
        for what in ("all", "token by token"):
            rise = figures[what][name]["rise"]
            verdict = "kept" if rise <= goal else "MISSED"
            print(f"{name}, {what}: {rise:+.2%}; at most {goal:.1%} was the goal: {verdict}")


if __name__ == "__main__":
    main()
