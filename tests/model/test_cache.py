import torch
from hypothesis import given, strategies as st

from moescope.model.cache import GROWTH, BlockPool, Cache, SlotForm


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


def test_a_kernel_is_handed_slots_again_only_when_they_have_moved() -> None:
    cache, handed = Cache(), []

    def reserve(batch: int, length: int) -> int:
        return cache.reserve(2, batch, SlotForm((3,), (1, 2), torch.float32), length, hand_over)[0]

    def hand_over(slots: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
        handed.append(slots)
        return len(handed)

    assert [reserve(2, 1), reserve(2, 5), reserve(2, GROWTH)] == [1, 1, 1]
    assert [tuple(t.shape) for t in handed[0][1]] == [(2, GROWTH, 3), (2, GROWTH, 1, 2)]
    handed[0][1][0][:, 4] = 7.0
    grown = handed[0][0][0].shape[1] + 1
    assert reserve(2, grown) == 2
    assert handed[1][1][0].shape[1] > grown and (handed[1][1][0][:, 4] == 7.0).all()
    states = torch.zeros(2, 1, 3), torch.zeros(2, 1, 1, 2)
    cache.update(0, *states, torch.tensor([[grown], [grown]]))
    assert reserve(2, grown) == 3


@given(st.data())
def test_rows_in_blocks_find_what_rows_side_by_side_find(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    numbers = iter(data.draw(st.permutations(range(1, 80))))
    pool, plain, tables = BlockPool(size), [Cache() for _ in lengths], [[] for _ in lengths]
    for _ in range(3):
        count = data.draw(st.integers(1, 3))
        for table, length in zip(tables, lengths, strict=True):
            while len(table) * size < length + count:
                table.append(next(numbers))
                pool.grow(80)
                pool.move(table[-1], 0, 0)
        positions = torch.stack([torch.arange(at, at + count) for at in lengths])
        keys = torch.randn(len(lengths), count, 2, generator=generator)
        rows = pool.rows(tables, max(lengths) + count)
        found, values = rows.update(3, keys, keys[..., 0], positions)
        further = rows.store(3, "more", keys, positions)
        assert torch.equal(found, further) and torch.equal(found[..., 0], values)
        for at, cache in enumerate(plain):
            held, _ = cache.update(3, keys[at : at + 1], keys[at : at + 1], positions[at : at + 1])
            assert torch.equal(found[at, : held.shape[1]], held[0])
            assert not found[at, held.shape[1] :].any()
        lengths = [length + count for length in lengths]


def test_a_block_begins_as_another_and_ends_with_zeros() -> None:
    pool = BlockPool(4)
    pool.grow(3)
    states = torch.randn(1, 4, 3)
    rows = pool.rows([[1]], 4)
    rows.update(0, states, states, torch.arange(4)[None])
    rows.store(0, "pairs", states[:, :2], torch.arange(2)[None], tokens_per_slot=2)
    pool.move(2, 1, 3)
    other = pool.rows([[2]], 4)
    new = torch.ones(1, 1, 3)
    held, _ = other.update(0, new, new, torch.tensor([[3]]))
    assert torch.equal(held, torch.cat([states[:, :3], new], dim=1))
    pairs = other.store(0, "pairs", new, torch.tensor([[1]]), tokens_per_slot=2)
    assert torch.equal(pairs, torch.cat([states[:, :1], new], dim=1))
    pool.move(2, 0, 0)
    assert not any(held[2].any() for held in pool._tensors())


def test_blocks_take_memory_when_they_are_used() -> None:
    pool = BlockPool(64, limit=2**20)  # of 16 GiB, if they were touched
    pool.grow(2)
    states = torch.ones(1, 1, 32)
    rows = pool.rows([[1]], 1)
    held, _ = rows.update(0, states, states, torch.zeros(1, 1, dtype=torch.int64))
    assert held.shape == (1, 1, 32) and pool.block_bytes == 64 * 2 * 32 * 4
