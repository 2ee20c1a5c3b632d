from pathlib import Path
from typing import Any

import pytest
from small import write_config
from texts import POEMS, PROSE, SUMS, write_jsonl

from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.data import ShardIndex, build_shards
from moescope.training.kinds import make_kind
from moescope.training.text import with_special_ids
from moescope.training.trainer import Trainer


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


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each training in this process the second that measuring the machine takes."""
    monkeypatch.setattr("moescope.training.trainer.measure_gemm_peak", lambda _: 1e11)


@pytest.fixture
def config(tmp_path: Path, corpus: Path, vocabulary: Path):
    """Return a function that makes a config of the small training with some fields changed."""

    def make(**changes: dict[str, Any]) -> TrainConfig:
        path = write_config(tmp_path / "config.toml", **changes)
        data = {"source": corpus, "tokenizer": vocabulary}
        return TrainConfig.from_file(path, {"data": data})

    return make


@pytest.fixture
def trainer(tmp_path: Path, config):
    """Return a function that makes a trainer of the small training with some fields changed."""

    def make(out: str = "out", **changes: dict[str, Any]) -> Trainer:
        made = config(**changes)
        kind = make_kind(made, tmp_path / out, lambda _: None)
        model = with_special_ids(made.model, kind.tokenizer)
        return Trainer(made.model_copy(update={"model": model}), tmp_path / out, kind)

    return make
