import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope.model.cache import GROWTH, Cache


@given(st.integers(1, 4), st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 99))
def test_what_was_stored_comes_back_in_order(batch: int, runs: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, start = Cache(), 0
    stored = torch.empty(batch, 0, 2, 3)
    for run in runs:
        keys = torch.randn(batch, run, 2, 3, generator=generator)
        positions = torch.arange(start, start + run).expand(batch, -1)
        held, values = cache.update(7, keys, keys[..., 0], positions)
        stored, start = torch.cat([stored, keys], dim=1), start + run
        assert torch.equal(held, stored)
        assert torch.equal(values, stored[..., 0])
    assert cache.nbytes == batch * start * (2 * 3 + 2) * 4


def test_a_shorter_row_overwrites_its_padding() -> None:
    cache = Cache()
    first = torch.arange(6.0).reshape(2, 3, 1)
    cache.update(0, first, first, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    new = torch.tensor([[[10.0]], [[20.0]]])
    held, _ = cache.update(0, new, new, torch.tensor([[3], [1]]))
    assert held[0, :, 0].tolist() == [0, 1, 2, 10]
    assert held[1, :2, 0].tolist() == [3, 20]


def test_kept_rows_are_the_ones_named() -> None:
    cache = Cache()
    states = torch.randn(3, 2, 4)
    cache.update(0, states, states, torch.arange(2).expand(3, -1))
    cache.keep(torch.tensor([2, 0]), 2)
    new = torch.zeros(2, 1, 4)
    held, _ = cache.update(0, new, new, torch.tensor([[2], [2]]))
    assert torch.equal(held[:, :2], states[[2, 0]])


def test_a_row_joins_at_the_size_that_the_longest_needs() -> None:
    def of(rows: int, length: int) -> Cache:
        cache = Cache()
        states = torch.randn(rows, length, 4)
        cache.update(0, states, states[..., :1], torch.arange(length).expand(rows, -1))
        return cache

    wide, narrow = of(2, 5 * GROWTH), of(1, 3)
    states = [wide._slots[0][0][1, :7].clone(), narrow._slots[0][0][0, :3].clone()]
    wide.length = 7  # as when a longer row has left
    wide.join(narrow)
    keys, values = wide._slots[0]
    assert keys.shape == (3, GROWTH, 4) and values.shape == (3, GROWTH, 1)
    assert torch.equal(keys[1, :7], states[0]) and torch.equal(keys[2, :3], states[1])
    assert wide.length == 7 and not keys[2, 3:].any()


def test_a_kernel_is_handed_slots_again_only_when_they_have_moved() -> None:
    cache, handed = Cache(), []

    def reserve(batch: int, length: int) -> int:
        return cache.reserve(2, batch, ((3,), (1, 2)), length, hand_over)

    def hand_over(slots: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
        handed.append(slots)
        return len(handed)

    assert [reserve(2, 1), reserve(2, 5), reserve(2, GROWTH)] == [1, 1, 1]
    assert [tuple(t.shape) for t in handed[0][1]] == [(2, GROWTH, 3), (2, GROWTH, 1, 2)]
    handed[0][1][0][:, 4] = 7.0
    grown = handed[0][0][0].shape[1] + 1
    assert reserve(2, grown) == 2
    assert handed[1][1][0].shape[1] > grown and (handed[1][1][0][:, 4] == 7.0).all()
    cache.keep(torch.tensor([1]), grown)
    assert reserve(1, grown) == 3 and len(handed[2][0][0]) == 1
    states = torch.zeros(1, 1, 3), torch.zeros(1, 1, 1, 2)
    cache.update(0, *states, torch.tensor([[grown]]))
    assert reserve(1, grown) == 4
