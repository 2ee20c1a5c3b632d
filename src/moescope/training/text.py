"""What a training reads: its tokenizer and its token files, opened or made, and how they fit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.text.split import Fingerprint, TrainedDomain, TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import DataConfig
from moescope.training.data import Progress, ShardIndex, build_shards
from moescope.training.start import locate_start
from moescope.training.vocabulary import learn_vocabulary

SECONDS_BETWEEN_MESSAGES = 10.0


@dataclass(frozen=True)
class TrainingText:
    tokenizer: Tokenizer
    train: ShardIndex
    held_out: ShardIndex

    @property
    def remembered(self) -> TrainedText:
        """By what this text, and which of it was held out, is known again."""
        trained = {shard.domain: shard for shard in self.train.shards}
        held_out = {shard.domain: shard for shard in self.held_out.shards}
        return TrainedText(
            {
                domain: TrainedDomain(
                    trained[domain].fingerprint if domain in trained else Fingerprint(),
                    held_out[domain].fingerprint if domain in held_out else Fingerprint(),
                    (trained.get(domain) or held_out[domain]).held_out_below,
                )
                for domain in sorted({*trained, *held_out})
            }
        )


def prepare_text(
    data: DataConfig,
    model: ModelConfig,
    out: Path,
    say: Callable[[str], None],
    *,
    start: str | None = None,
) -> TrainingText:
    """Open what `data` names; token files go to `out/shards`, a new tokenizer to `out/tokenizer`.

    A training that starts from a model's weights reads with that model's tokenizer.

    Raises:
        UserError: no text is named or found, a token file is corrupt, the text is too little for
            a tokenizer of `vocab_size`, the tokenizer has more tokens than the model, or it is
            not that of the model started from.
    """
    if data.source is None:
        raise UserError("the config names no text; give --data FOLDER or `source` in [data]")
    if start is not None:
        tokenizer = _tokenizer_of_start(data.tokenizer, locate_start(start))
    else:
        tokenizer = _open_tokenizer(data, data.source, model.vocab_size, out / "tokenizer", say)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is "
            f"{model.vocab_size}; raise vocab_size in [model] or choose a smaller tokenizer"
        )
    shards, progress = out / "shards", _announce(say)
    train = build_shards(data.source, shards, tokenizer, progress=progress)
    held_out = build_shards(data.source, shards, tokenizer, held_out=True, progress=progress)
    say(f"{train.total_tokens:,} tokens of text in {', '.join(train.domains)}")
    return TrainingText(tokenizer, train, held_out)


def with_special_ids(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Fill in the special tokens' ids that the config leaves out.

    Raises:
        UserError: the config gives another id than the tokenizer has.
    """
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    for field, token_id in ids.items():
        given = getattr(model, field)
        if isinstance(given, int) and token_id is not None and given != token_id:
            raise UserError(
                f"{field} is {given} in [model] but {token_id} in the tokenizer; leave it out"
            )
    return model.model_copy(update={f: i for f, i in ids.items() if getattr(model, f) is None})


def _tokenizer_of_start(named: Path | None, start: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(start)
    if named is not None and Tokenizer.load(named).hash != tokenizer.hash:
        raise UserError(
            f"the tokenizer {named} is not that of {start}, whose weights [start] takes and which "
            "know no other; leave --tokenizer out"
        )
    return tokenizer


def _open_tokenizer(
    data: DataConfig, source: Path, vocab_size: int, folder: Path, say: Callable[[str], None]
) -> Tokenizer:
    if data.tokenizer is not None:
        return Tokenizer.load(data.tokenizer)
    if not (folder / "tokenizer.json").exists():
        say(f"learning a vocabulary of {vocab_size} tokens from {source}")
        learn_vocabulary(source, vocab_size, folder)
    return Tokenizer.load(folder)


def _announce(say: Callable[[str], None]) -> Progress:
    """Tell now and then how far the encoding is."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
            last = time.monotonic()
            say(f"encoding the text: {done / max(total, 1):.0%}")

    return progress
