"""Shards against a plain re-encoding."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from texts import POEMS, PROSE, documents, write_jsonl
from tokenizers import Tokenizer as BackendTokenizer

from moescope.errors import UserError
from moescope.text.tokenizer import Tokenizer
from moescope.training.data import ShardIndex, build_shards


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


def test_source_code_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A file is a document; what is no text by its name is passed over."""
    texts = {f"code/part{n}.py": f"def f{n}():\n    return {n}\n" for n in range(9)}
    texts |= {"docs/a.rst": "Title\n=====\n", "code/lib.rs": "fn main() {}\n"}
    for name, text in {**texts, "code/data.bin": "no text", "code/x.json": "{}"}.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found: list[str] = []
    for held_out in (False, True):
        index = build_shards(tmp_path / "text", tmp_path / "shards", tokenizer, held_out=held_out)
        found += [
            tokenizer.decode(ids) for domain in index.domains for ids in documents(index, domain)
        ]
    assert sorted(found) == sorted(texts.values())


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
