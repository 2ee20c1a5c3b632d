from pathlib import Path

import pytest
from texts import POEMS, PROSE, SUMS, write_jsonl

from moescope.text.tokenizer import Tokenizer
from moescope.training.data import ShardIndex, build_shards


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_on_texts(PROSE + POEMS, vocab_size=300, progress=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "text" / "prose" / "a.jsonl", PROSE)
    write_jsonl(tmp_path / "text" / "poetry" / "b.jsonl", POEMS)
    return tmp_path / "text"


@pytest.fixture
def index(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> ShardIndex:
    return build_shards(source, tmp_path / "shards", tokenizer)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains with held-out text, and the folder of a vocabulary beside them."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    for domain, texts in (("prose", PROSE), ("poetry", POEMS), ("sums", SUMS)):
        write_jsonl(folder / "train" / domain / "a.jsonl", texts[:50])
        write_jsonl(folder / "held_out" / domain / "a.jsonl", texts[50:])
    return folder


@pytest.fixture(scope="session")
def vocabulary(corpus: Path) -> Path:
    Tokenizer.train_on_texts(PROSE + POEMS + SUMS, vocab_size=300, progress=False).save(
        corpus.parent / "tokenizer"
    )
    return corpus.parent / "tokenizer"
