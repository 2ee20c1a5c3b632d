"""Batches against the documents they came from, and against themselves after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from texts import POEMS, PROSE, documents, write_jsonl

from moescope.errors import UserError
from moescope.text.tokenizer import Tokenizer
from moescope.training.batches import HeldOutBatches, PackedBatches
from moescope.training.data import ShardIndex, build_shards


@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 5),
    sequence_length=st.integers(1, 90),
    before=st.integers(0, 12),
)
def test_a_resumed_run_sees_the_same_batches(
    shared_index: ShardIndex, seed: int, batch_size: int, sequence_length: int, before: int
) -> None:
    def fresh() -> PackedBatches:
        return PackedBatches(
            shared_index, batch_size=batch_size, sequence_length=sequence_length, seed=seed
        )

    run, resumed = fresh(), fresh()
    for _ in range(before):
        run.next()
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    for _ in range(8):
        for one, other in zip(run.next(), resumed.next(), strict=True):
            assert one.dtype == other.dtype and one.equal(other)


@pytest.fixture(scope="module")
def shared_index(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shared")
    write_jsonl(folder / "text" / "train" / "prose" / "a.jsonl", PROSE[:7])
    write_jsonl(folder / "text" / "train" / "poetry" / "b.jsonl", POEMS[:4])
    (folder / "text" / "held_out").mkdir()
    return build_shards(folder / "text", folder / "shards", tokenizer)


def test_an_epoch_holds_every_document_once_in_a_new_order(
    shared_index: ShardIndex, tokenizer: Tokenizer
) -> None:
    epoch = shared_index.shards[1].tokens
    batches = PackedBatches(
        shared_index,
        batch_size=1,
        sequence_length=epoch,
        seed=3,
        domain_weights={"prose": 1.0, "poetry": 0.0},
    )
    orders = []
    last = None
    for _ in range(3):
        ids, domain_ids = batches.next()  # (1, epoch + 1), (1,)
        assert domain_ids.tolist() == [1]
        row = ids[0].tolist()
        assert last is None or row[0] == last
        last = row[-1]
        text = tokenizer.decode(row[:-1], skip_special_tokens=False)
        found = text.replace("<｜begin▁of▁sentence｜>", "").split("<｜end▁of▁sentence｜>")[:-1]
        assert sorted(found) == sorted(PROSE[:7])
        orders.append(tuple(found))
    assert len(set(orders)) == 3


def test_domains_are_drawn_by_weight(index: ShardIndex) -> None:
    batches = PackedBatches(
        index,
        batch_size=64,
        sequence_length=8,
        seed=0,
        domain_weights={"prose": 3, "poetry": 1},
    )
    drawn = np.concatenate([batches.next()[1].numpy() for _ in range(20)])
    assert 0.70 < (drawn == index.domains.index("prose")).mean() < 0.80


def test_rows_come_from_their_domain(index: ShardIndex, tokenizer: Tokenizer) -> None:
    ids, domain_ids = PackedBatches(index, batch_size=16, sequence_length=60, seed=1).next()
    assert ids.shape == (16, 61) and len(set(domain_ids.tolist())) == 2
    for row, domain_id in zip(ids.tolist(), domain_ids.tolist(), strict=True):
        assert ("There" in tokenizer.decode(row)) == (index.domains[domain_id] == "prose")


@pytest.mark.parametrize(
    "weights", [{"prose": 1.0}, {"prose": 1, "poetry": 1, "x": 1}, {"prose": 0, "poetry": 0},
                {"prose": -1, "poetry": 2}, {"prose": float("nan"), "poetry": 1}]
)  # fmt: skip
def test_weights_that_cannot_be(index: ShardIndex, weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="weight"):
        PackedBatches(index, batch_size=1, sequence_length=8, seed=0, domain_weights=weights)


def test_a_position_of_other_data_is_refused(index: ShardIndex, shared_index: ShardIndex) -> None:
    state = PackedBatches(index, batch_size=1, sequence_length=8, seed=0).state_dict()
    for other_index, seed in ((shared_index, 0), (index, 1)):
        with pytest.raises(UserError, match="saved position belongs to"):
            PackedBatches(other_index, batch_size=1, sequence_length=8, seed=seed).load_state_dict(
                state
            )


@pytest.mark.parametrize(
    ("changed", "read_on"),
    [
        ({}, {"poetry", "prose"}),
        ({"poetry": POEMS[1:]}, {"prose"}),
        ({"sums": PROSE[3:6]}, {"poetry", "prose"}),
        ({"code": PROSE[3:6]}, set()),  # the first domain now: each later one has another order
    ],
)
def test_another_training_reads_on_where_the_text_is_the_same(
    tokenizer: Tokenizer, tmp_path: Path, changed: dict[str, list[str]], read_on: set[str]
) -> None:
    def batches(name: str, texts: dict[str, list[str]], seed: int = 0) -> PackedBatches:
        for domain, text in texts.items():
            write_jsonl(tmp_path / name / "train" / domain / "a.jsonl", text)
        (tmp_path / name / "held_out").mkdir(exist_ok=True)
        index = build_shards(tmp_path / name, tmp_path / f"{name}-shards", tokenizer)
        return PackedBatches(index, batch_size=2, sequence_length=16, seed=seed)

    texts = {"poetry": POEMS[:4], "prose": PROSE[:4]}
    before = batches("before", texts)
    for _ in range(4):
        before.next()
    saved = json.loads(json.dumps(before.state_dict()))
    starts = batches("before", texts).epochs()
    for seed, expected in ((0, read_on), (1, set())):
        after = batches("after", texts | changed, seed)
        after.read_on(saved)
        for domain, epochs in after.epochs().items():
            assert epochs == (before.epochs()[domain] if domain in expected else 0.0)
    assert all(before.epochs()[domain] > starts[domain] for domain in texts)


def test_held_out_batches_predict_each_token_once(index: ShardIndex, tokenizer: Tokenizer) -> None:
    every = [token for ids in documents(index, "poetry") for token in ids]
    held_out = HeldOutBatches(index, "poetry", 4, 16, 10**9)
    batches = list(held_out)
    assert all(batch.shape[1] == 17 and len(batch) <= 4 for batch in batches)
    predicted = [token for batch in batches for row in batch.tolist() for token in row[1:]]
    assert predicted == every[1 : 1 + held_out.n_tokens]
    assert 0 <= len(every) - 1 - held_out.n_tokens < 16
    plain_bytes = b"".join(tokenizer.token_bytes(i) for i in predicted if i > 1)
    assert held_out.n_bytes == len(plain_bytes)
    assert HeldOutBatches(index, "poetry", 4, 16, 100).n_tokens == 96
    [short] = HeldOutBatches(index, "poetry", 4, 10**6, 10**9)
    assert short[0].tolist() == every


def test_no_held_out_text_of_a_domain(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="no held-out text of domain music; choose from poetry"):
        HeldOutBatches(index, "music", 1, 8, 100)
