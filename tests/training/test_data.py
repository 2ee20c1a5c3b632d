"""Shards against a plain re-encoding; batches against themselves after a resume."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer

from moescope.errors import UserError
from moescope.tokenizer import Tokenizer
from moescope.training.data import PackedBatches, ShardIndex, build_shards, held_out_batches

PROSE = [f"There were {i} books upon the shelf, and nobody had read them." for i in range(60)]
POEMS = [f"第{i}首：床前明月光，疑是地上霜。" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_on_texts(PROSE + POEMS, vocab_size=300, progress=False)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "text" / "prose" / "a.jsonl", PROSE)
    write_jsonl(tmp_path / "text" / "poetry" / "b.jsonl", POEMS)
    return tmp_path / "text"


@pytest.fixture
def index(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> ShardIndex:
    return build_shards(source, tmp_path / "shards", tokenizer)


def documents(index: ShardIndex, domain: str) -> list[list[int]]:
    domain_id = index.domains.index(domain)
    count = index.shards[domain_id].documents
    return [index.document(domain_id, number).tolist() for number in range(count)]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return [0, *tokenizer.encode(text), 1]


def test_shards_equal_a_plain_encoding_of_the_split(
    source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    train = build_shards(source, tmp_path / "shards", tokenizer)
    held_out = build_shards(source, tmp_path / "shards", tokenizer, held_out=True)
    assert train.domains == held_out.domains == ["poetry", "prose"]
    for domain, texts in (("prose", PROSE), ("poetry", POEMS)):
        held = documents(held_out, domain)
        assert 1 <= len(held) <= 5
        encoded = [plain(tokenizer, text) for text in texts]
        assert documents(train, domain) == [ids for ids in encoded if ids not in held]
        assert held == [ids for ids in encoded if ids in held]
    sizes = [shard.text_bytes for shard in train.shards + held_out.shards]
    assert sum(sizes) == sum(len(text.encode()) for text in PROSE + POEMS)


def test_every_kind_of_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = tmp_path / "text" / "train"
    write_jsonl(train / "lines" / "deep" / "a.jsonl", ["one", "two"])
    (train / "plain").mkdir()
    (train / "plain" / "b.md").write_text("# three\n")
    (train / "c.txt").write_text("four")
    packed = b'{"text": "five", "domain": "own"}\n\n{"text": "", "domain": "own"}\n'
    (train / "packed").mkdir()
    frames = [zstandard.compress(packed[:20]), zstandard.compress(packed[20:])]
    (train / "packed" / "d.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"text": ["six", "seven"], "domain": ["own", None], "extra": [1, 2]})
    pyarrow.parquet.write_table(table, train / "packed" / "e.parquet")
    (train / ".hidden.txt").write_text("not this")
    write_jsonl(tmp_path / "text" / "held_out" / "lines" / "f.jsonl", ["eight"])
    index = build_shards(tmp_path / "text", tmp_path / "shards", tokenizer)
    assert {domain: documents(index, domain) for domain in index.domains} == {
        domain: [plain(tokenizer, text) for text in texts]
        for domain, texts in {
            "lines": ["one", "two"],
            "plain": ["# three\n"],
            "default": ["four"],
            "own": ["five", "six"],
            "packed": ["seven"],
        }.items()
    }
    held_out = build_shards(tmp_path / "text", tmp_path / "shards", tokenizer, held_out=True)
    assert documents(held_out, "lines") == [plain(tokenizer, "eight")]


@pytest.mark.parametrize("texts", [["a", "b"], ["a", "a", "b"], [str(i) for i in range(500)]])
def test_two_documents_suffice_for_a_held_out_part(
    texts: list[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    train = build_shards(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    held_out = build_shards(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, held_out=True)
    ours, theirs = documents(train, "default"), documents(held_out, "default")
    assert ours and theirs and len(ours) + len(theirs) == len(texts)
    assert not [ids for ids in theirs if ids in ours]


def test_one_document_is_for_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("alone")
    assert build_shards(tmp_path / "a.txt", tmp_path / "out", tokenizer).total_tokens > 2
    assert build_shards(tmp_path / "a.txt", tmp_path / "out", tokenizer, held_out=True).shards == []


def test_a_large_vocabulary_needs_four_bytes(
    source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    small = build_shards(source, tmp_path / "small", tokenizer)
    tokenizer.save(tmp_path)
    backend = BackendTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([f"word{i}" for i in range(2**16)])
    backend.save(str(tmp_path / "tokenizer.json"))
    wide = Tokenizer.load(tmp_path)
    large = build_shards(source, tmp_path / "large", wide)
    assert documents(large, "prose") == documents(small, "prose")
    sizes = [
        (index.folder / index.shards[0].tokens_file).stat().st_size for index in (small, large)
    ]
    assert sizes[1] == 2 * sizes[0]


def test_a_second_start_encodes_nothing(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    calls: list[tuple[int, int]] = []

    def build() -> ShardIndex:
        return build_shards(
            source, tmp_path / "shards", tokenizer, progress=lambda *done: calls.append(done)
        )

    first = build()
    assert calls and calls[-1][0] <= calls[-1][1]
    calls.clear()
    assert build().fingerprint == first.fingerprint
    assert not calls

    os.utime(source / "prose" / "a.jsonl", ns=(1, 1))
    assert build().fingerprint == first.fingerprint  # the same text gives the same files
    assert calls
    write_jsonl(source / "prose" / "a.jsonl", PROSE[:-1])
    assert build().fingerprint != first.fingerprint
    assert len(list((tmp_path / "shards" / "train").glob("*.tokens"))) == 2


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


def test_held_out_batches_predict_each_token_once(index: ShardIndex, tokenizer: Tokenizer) -> None:
    every = [token for ids in documents(index, "poetry") for token in ids]
    held_out = held_out_batches(index, "poetry", 4, 16, 10**9)
    batches = list(held_out)
    assert all(batch.shape[1] == 17 and len(batch) <= 4 for batch in batches)
    predicted = [token for batch in batches for row in batch.tolist() for token in row[1:]]
    assert predicted == every[1 : 1 + held_out.n_tokens]
    assert 0 <= len(every) - 1 - held_out.n_tokens < 16
    plain_bytes = b"".join(tokenizer.token_bytes(i) for i in predicted if i > 1)
    assert held_out.n_bytes == len(plain_bytes)
    assert held_out_batches(index, "poetry", 4, 16, 100).n_tokens == 96
    [short] = held_out_batches(index, "poetry", 4, 10**6, 10**9)
    assert short[0].tolist() == every


def test_no_held_out_text_of_a_domain(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="no held-out text of domain music; choose from poetry"):
        held_out_batches(index, "music", 1, 8, 100)


def test_damaged_shards_say_what_to_delete(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, index: ShardIndex
) -> None:
    path = index.folder / index.shards[0].tokens_file
    good = path.read_bytes()
    for bad, words in (
        (good[:-2], "bytes instead of"),
        (good[:-2] + bytes([good[-2] ^ 1, good[-1]]), "wrong checksum"),
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"{words}.*delete the folder .*{index.folder.name}"):
            build_shards(source, tmp_path / "shards", tokenizer)
    path.unlink()
    with pytest.raises(UserError, match="is missing; delete the folder"):
        build_shards(source, tmp_path / "shards", tokenizer)
    for text in ("{", json.dumps({**json.loads((index.folder / "index.json").read_text()),
                                  "shards": [{}]})):  # fmt: skip
        (index.folder / "index.json").write_text(text)
        with pytest.raises(UserError, match=r"index.json is damaged .*delete the folder"):
            build_shards(source, tmp_path / "shards", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', 'line 1 of .* no string field "text"'),
        ("a.jsonl", b"3\n", 'line 1 of .* no string field "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 of .* surrogate"),
        ("a.jsonl", b'{"text": ""}\n', "only empty documents"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl.zst", b"not zstd", "not a whole zstd file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 99)[:-3], "not a whole zstd file"),
        ("a.parquet", b"not parquet", "not a parquet file"),
        ("a.pdf", b"", "there is no text in"),
    ],
)
def test_bad_text_is_named(
    name: str, content: bytes, words: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        build_shards(folder, tmp_path / "shards", tokenizer)
    assert not list(tmp_path.rglob("*.tokens"))


def test_a_missing_path_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        build_shards(tmp_path / "nowhere", tmp_path / "shards", tokenizer)


def test_a_tokenizer_without_marks_is_refused(
    source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="bos_token and eos_token"):
        build_shards(source, tmp_path / "out", Tokenizer.load(tmp_path))
