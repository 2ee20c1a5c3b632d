"""Layers that see some of the past alone, in a cache as the engine uses it, against `transformers`.

Rows of unequal length are read together, join and leave, and a text goes on from where another
parted from it, which a state of a layer must stand as keys and values do.
"""

import copy

import pytest
import torch
from family_models import VARIANTS, published
from torch import Tensor

from moescope.checkpoint import load_model
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder

SPARSE = ["deepseek_v32", "glm_moe_dsa, shared picks"]
LENGTH = 41
TEXTS = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=SPARSE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    theirs = published(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("sparse")
    theirs.save_pretrained(folder)
    with torch.inference_mode():
        return load_model(folder), theirs(TEXTS).logits


def read(model: CausalLM, cache: Cache, pieces: list[tuple[int, int, int]]) -> Tensor:
    """Read a piece `(text, start, end)` for each row of a cache; return logits, padded behind."""
    longest = max(end - start for _, start, end in pieces)
    ids = [[*TEXTS[text, a:b].tolist(), *[5] * (longest - b + a)] for text, a, b in pieces]
    positions = torch.stack([torch.arange(a, a + longest) for _, a, _ in pieces])
    with torch.inference_mode():
        return model.logits(model(torch.tensor(ids), positions, cache))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_rows_of_unequal_length_go_on_together(pair: tuple[CausalLM, Tensor]) -> None:
    model, expected = pair
    cache, lengths = Cache(), [3, 14, 29]
    found = read(model, cache, [(row, 0, length) for row, length in enumerate(lengths)])
    for row, length in enumerate(lengths):
        close(found[row, :length], expected[row, :length])
    for _ in range(12):
        found = read(model, cache, [(row, at, at + 1) for row, at in enumerate(lengths)])
        close(found[:, 0], expected[range(3), lengths])
        lengths = [length + 1 for length in lengths]


def test_chunks_of_any_size_join_on(pair: tuple[CausalLM, Tensor]) -> None:
    model, expected = pair
    cache, at = Cache(), 0
    for size in (1, 2, 1, 7, 3, 11, 1, 5, 10):
        close(read(model, cache, [(0, at, at + size)])[0], expected[0, at : at + size])
        at += size


def test_rows_join_leave_and_part(pair: tuple[CausalLM, Tensor]) -> None:
    model, expected = pair
    cache, other = Cache(), Cache()
    read(model, cache, [(0, 0, 9), (1, 0, 6)])
    read(model, other, [(2, 0, 31)])
    for cut in (31, 22, 10, 5):  # a text that begins as this one did is read from there
        part = other.copy(0, cut)
        close(read(model, part, [(2, cut, 41)])[0, : 41 - cut], expected[2, cut:])
    cache.join(copy.deepcopy(other))
    found = read(model, cache, [(0, 9, 12), (1, 6, 9), (2, 31, 34)])
    for row, start in enumerate((9, 6, 31)):
        close(found[row], expected[row, start : start + 3])
    cache.keep(torch.tensor([2, 1]), 34)
    found = read(model, cache, [(2, 34, 36), (1, 9, 11)])
    close(found[0], expected[2, 34:36])
    close(found[1], expected[1, 9:11])


def test_an_indexer_shows_what_it_picked(pair: tuple[CausalLM, Tensor]) -> None:
    model, _ = pair
    seen: dict[int, Tensor] = {}

    class Watcher(Recorder):
        wants_attention = True

        def picks(self, layer_idx: int, picked: Tensor, tokens_per_slot: int) -> None:
            seen[layer_idx] = picked

        def attention(self, layer_idx: int, probabilities: Tensor) -> None:
            if layer_idx in seen:
                looked_at = (probabilities > 0).any(dim=1)
                assert torch.equal(looked_at, seen[layer_idx])

    with torch.inference_mode():
        model(TEXTS, recorder=Watcher())
    assert seen
    for picked in seen.values():
        slots = torch.arange(1, LENGTH + 1).clamp(max=model.config.index_topk)
        assert torch.equal(picked.sum(dim=-1), slots.expand(3, -1))
