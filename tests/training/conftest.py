from pathlib import Path

import pytest
from texts import POEMS, PROSE, write_jsonl

from moescope.tokenizer import Tokenizer
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
