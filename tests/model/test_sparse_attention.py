"""Layers that see some of the past alone, in a cache as the engine uses it, against `transformers`.

Rows of unequal length are read together, join and leave, and a text goes on from where another
parted from it, which a state of a layer must stand as keys and values do.
"""

import pytest
import torch
from family_models import VARIANTS, published
from torch import Tensor

from moescope.checkpoint import load_model
from moescope.engine.runner import block_tokens
from moescope.model.cache import BlockPool, BlockRows, Cache
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder

SPARSE = ["deepseek_v32", "glm_moe_dsa, shared picks", "deepseek_v4", "deepseek_v4, YaRN"]
LENGTH = 41
TEXTS = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=SPARSE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    theirs = published(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("sparse")
    theirs.save_pretrained(folder)
    with torch.inference_mode():
        return load_model(folder), theirs(TEXTS).logits


def read(model: CausalLM, cache: Cache | BlockRows, pieces: list[tuple[int, int, int]]) -> Tensor:
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


@torch.inference_mode()
def test_rows_join_leave_and_part(pair: tuple[CausalLM, Tensor]) -> None:
    model, expected = pair
    size = block_tokens(model.config)
    pool = BlockPool(size)
    blocks = -(-LENGTH // size)
    tables = [list(range(1 + at * blocks, 1 + (at + 1) * blocks)) for at in range(4)]
    pool.grow(1 + 4 * blocks)

    def rows(*texts: int, length: int) -> BlockRows:
        return pool.rows([tables[at] for at in texts], length)

    read(model, rows(0, length=9), [(0, 0, 9)])
    read(model, rows(1, length=6), [(1, 0, 6)])
    read(model, rows(2, length=31), [(2, 0, 31)])
    for cut in (31, 22, 10, 5):  # a text that begins as this one did is read from there
        for at, (block, source) in enumerate(zip(tables[3], tables[2], strict=True)):
            pool.move(block, source, min(size, max(0, cut - at * size)))
        found = read(model, rows(3, length=41), [(2, cut, 41)])
        close(found[0, : 41 - cut], expected[2, cut:])
    found = read(model, rows(0, 1, 2, length=34), [(0, 9, 12), (1, 6, 9), (2, 31, 34)])
    for row, start in enumerate((9, 6, 31)):
        close(found[row], expected[row, start : start + 3])
    found = read(model, rows(2, 1, length=36), [(2, 34, 36), (1, 9, 11)])
    close(found[0], expected[2, 34:36])
    close(found[1], expected[1, 9:11])


class Watcher(Recorder):
    wants_attention = True

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, int]] = {}
        self.shares: dict[int, Tensor] = {}
        self.entry_shares: dict[int, Tensor] = {}
        self.sink_shares: dict[int, Tensor] = {}
        self.mixings: list[tuple[Tensor, Tensor, Tensor]] = []

    def picks(self, layer_idx: int, seen: Tensor, tokens_per_slot: int) -> None:
        self.seen[layer_idx] = seen, tokens_per_slot

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        self.shares[layer_idx] = probabilities

    def entry_attention(self, layer_idx: int, probabilities: Tensor, tokens_per_slot: int) -> None:
        self.entry_shares[layer_idx] = probabilities

    def sinks(self, layer_idx: int, shares: Tensor) -> None:
        self.sink_shares[layer_idx] = shares

    def mixing(self, layer_idx: int, half: str, pre: Tensor, post: Tensor, mix: Tensor) -> None:
        self.mixings.append((pre, post, mix))


def test_a_recorder_sees_what_is_looked_at(pair: tuple[CausalLM, Tensor]) -> None:
    model, _ = pair
    watcher, config = Watcher(), model.config
    with torch.inference_mode():
        model(TEXTS, recorder=watcher)
    assert watcher.seen
    for layer_idx, (seen, tokens) in watcher.seen.items():
        past = torch.arange(1, LENGTH + 1) // tokens
        assert torch.equal(seen.sum(dim=-1), past.clamp(max=config.index_topk).expand(3, -1))
        shares = watcher.shares if tokens == 1 else watcher.entry_shares
        assert torch.equal((shares[layer_idx] > 0).any(dim=1), seen)
    for layer_idx, shares in watcher.shares.items():
        total = shares.sum(dim=-1)
        if layer_idx in watcher.entry_shares:
            total = total + watcher.entry_shares[layer_idx].sum(dim=-1)
        if layer_idx in watcher.sink_shares:
            assert watcher.sink_shares[layer_idx].min() > 0
            total = total + watcher.sink_shares[layer_idx]
        torch.testing.assert_close(total, torch.ones_like(total))
    if config.hc_mult is not None:
        assert len(watcher.mixings) == 2 * config.num_hidden_layers
        for _, _, mix in watcher.mixings:
            ones = torch.ones(3, LENGTH, config.hc_mult)
            torch.testing.assert_close(mix.sum(dim=-2), ones, rtol=0, atol=1e-4)
            torch.testing.assert_close(mix.sum(dim=-1), ones, rtol=0, atol=0.1)
