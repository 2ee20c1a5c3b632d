"""What `tiny` writes in int8, word for word, on every instruction set that this machine runs.

`golden/tiny-int8.json` holds greedy continuations as AVX-512 makes them; they are the same for any
number of threads, and whether prompts go in alone or together. Another instruction set sums in
another order: hidden states of the first two layers differ by 1e-7 of their size. Now and then
that moves an activation across the border between two steps of int8, which is 1e-3 of a state, and
what follows differs by so much: logits by a few hundredths. Where the two likeliest tokens are
closer than that, another text follows. So on every instruction set each token of the golden text
must be the likeliest but for such near ties, and `generate` must write the golden text up to the
first of them.

After a change of the model in the box, or of what the kernels round: `python
tests/engine/test_golden.py` writes the file anew.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moescope
from moescope.api import Model
from moescope.catalog import BOX
from moescope.kernels import cpu
from moescope.model.cache import Cache

GOLDEN = Path(__file__).parent / "golden" / "tiny-int8.json"
TIE = 0.1
"""Nats that a near tie may be wide."""
MOSTLY = 0.6
"""Of the golden tokens, how many must be written before the first near tie of their text."""
PROMPTS = [
    "《春晓》\n唐·孟浩然\n春眠不觉晓，",
    "床前明月光，",
    "The old man looked at the sea and",
    "def fibonacci(n):\n",
    "<｜User｜>17 + 25 = ?<｜Assistant｜>",
    "<｜User｜>Translate into Chinese: The moon is bright.<｜Assistant｜>",
    "Once upon a time",
]
MAX_TOKENS = 48


def weights_hash() -> str:
    return hashlib.sha256((BOX / "tiny" / "model.safetensors").read_bytes()).hexdigest()


def opened() -> Model:
    return moescope.load("tiny", backend="cpu", quantize="int8")


def write_golden() -> None:
    """Let the model write, and keep it."""
    made = opened().generate(PROMPTS, max_tokens=MAX_TOKENS)
    texts = [
        {"prompt": prompt, "text": each.text, "ids": [token.id for token in each.tokens]}
        for prompt, each in zip(PROMPTS, made, strict=True)
    ]
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in texts)
    GOLDEN.write_text(f'{{"weights": "{weights_hash()}", "texts": [\n{lines}\n]}}\n', "utf-8")


@torch.inference_mode()
def behind_the_likeliest(model: Model, prompt: str, ids: list[int]) -> list[float]:
    """How far each token's logit is below the highest, reading `ids` one by one after `prompt`."""
    read, cache = model.engine.encode(prompt), Cache()
    step, gaps = torch.tensor([read]), []
    for token_id in ids:
        positions = torch.arange(cache.length, cache.length + step.shape[1])[None]
        logits = model.network.logits(model.network(step, positions, cache)[0, -1])
        gaps.append(float(logits.max() - logits[token_id]))
        step = torch.tensor([[token_id]])
    return gaps


@pytest.fixture(params=cpu.instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    if not cpu.available():
        pytest.skip("the extension is not built")
    before = cpu.instruction_set()
    assert before is not None
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


def test_greedy_text_is_the_golden_one(isa: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["weights"] == weights_hash(), f"the model changed: run python {__file__}"
    model = opened()
    made = model.generate([each["prompt"] for each in golden["texts"]], max_tokens=MAX_TOKENS)
    reached = 0
    for each, now in zip(golden["texts"], made, strict=True):
        gaps = behind_the_likeliest(model, each["prompt"], each["ids"])
        assert max(gaps) < TIE, each["prompt"]
        certain = next((at for at, gap in enumerate(gaps) if gap > 0), len(gaps))
        written = [token.id for token in now.tokens]
        assert written[:certain] == each["ids"][:certain], each["prompt"]
        if certain == len(gaps):
            assert now.text == each["text"]
        reached += certain
    assert reached >= MOSTLY * sum(len(each["ids"]) for each in golden["texts"])


if __name__ == "__main__":
    write_golden()
