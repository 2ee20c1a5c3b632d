"""A GGUF file's vocabulary as a `Tokenizer` that gives a text the ids that llama.cpp gives it.

Two kinds are read: `gpt2`, spelled in bytes, with a list of merges and rules by which text is cut
first; and `llama`, SentencePiece's, which marks words with ▁ and merges whatever makes the token of
the highest score.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as BackendTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from moescope.errors import UserError
from moescope.formats.gguf.container import damaged
from moescope.formats.gguf.metadata import Fields
from moescope.formats.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from moescope.text.tokenizer import Tokenizer, set_around

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)
"""Token types that are matched in text as a whole, not spelled by merges."""
KINDS = ("gpt2", "llama")
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Where SentencePiece has its special tokens if a file does not say."""


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether there is a vocabulary, of whatever kind."""
    return metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def knows_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether `tokenizer` can make something of the vocabulary's kind."""
    kind, rules = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    return kind == "llama" or (kind == "gpt2" and (rules or "default") in list(PRE_TOKENIZERS))


def tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the vocabulary that metadata hold.

    Raises:
        UserError: there is none, it contradicts itself, or it is of a kind that moescope does not
            know.
    """
    fields = Fields(path, metadata)
    kind = fields.get("tokenizer.ggml.model", str)
    rules = fields.get("tokenizer.ggml.pre", str, "default")
    if not knows_vocabulary(metadata):
        what = (
            f"that cuts text by the rules {rules[:40]!r}, which moescope does not know"
            if kind == "gpt2"
            else f"of the kind {kind[:40]!r}; moescope knows {' and '.join(map(repr, KINDS))}"
        )
        raise UserError(
            f"{path} holds a vocabulary {what}: put the model's tokenizer.json beside the file"
        )
    tokens = fields.items("tokenizer.ggml.tokens", str)
    types = fields.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise damaged(path, f"its {len(tokens)} tokens have {len(types)} types, or repeat")
    if kind == "llama":
        backend, adds_bos, ids = (
            _sentencepiece(path, fields, tokens, types),
            True,
            SENTENCEPIECE_IDS,
        )
    else:
        backend, ids = _byte_level(path, fields, tokens, types, rules), dict[str, int]()
        adds_bos = PRE_TOKENIZERS[rules].adds_bos
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in WHOLE
        ]
    )
    config = _tokenizer_config(path, fields, tokens, ids)
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", bool, adds_bos)
    adds_eos = fields.get("tokenizer.ggml.add_eos_token", bool, False)
    set_around(
        backend,
        begin=config.get("bos_token") if adds_bos else None,
        end=config.get("eos_token") if adds_eos else None,
    )
    return Tokenizer(backend, config)


def _byte_level(
    path: Path, fields: Fields, tokens: Sequence[str], types: Sequence[int], rules: str
) -> BackendTokenizer:
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, kind in zip(tokens, types, strict=True):
        if kind == NORMAL and not alphabet.issuperset(token):
            raise damaged(path, f"the token {token!r} is not spelled in bytes")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    known = PRE_TOKENIZERS[rules]
    merges = list(_merges(path, fields, ids))
    backend = BackendTokenizer(
        models.BPE(vocab=ids, merges=merges, ignore_merges=known.takes_whole_words)
    )
    backend.pre_tokenizer = cutting(known)
    backend.decoder = decoders.ByteLevel()
    return backend


def cutting(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Return what cuts text by these rules and spells the pieces in bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _merges(path: Path, fields: Fields, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that are merged, the first to be merged first."""
    for number, merge in enumerate(fields.items("tokenizer.ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise damaged(path, f"the merge number {number} is of tokens that it lacks")
        yield left, right


def _sentencepiece(
    path: Path, fields: Fields, tokens: Sequence[str], types: Sequence[int]
) -> BackendTokenizer:
    """Return what merges by scores: the pairs that make the token of the highest come first.

    Characters without a token become the tokens of their bytes, `<0x00>` to `<0xFF>`.
    """
    scores = fields.items("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise damaged(path, f"its {len(tokens)} tokens have {len(scores)} scores")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    made = [at for at, kind in enumerate(types) if kind not in (CONTROL, UNKNOWN)]
    made.sort(key=lambda at: -scores[at])  # stable: of equal scores the first token comes first
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[at] for at in made)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", int, 0)]
    backend = BackendTokenizer(
        models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token=unknown, fuse_unk=True)
    )
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", bool, True)
    marked = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), marked]) if prefixed else marked
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])]
    )
    return backend


def _tokenizer_config(
    path: Path, fields: Fields, tokens: Sequence[str], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Return what `tokenizer_config.json` would say; `ids` count where the file is silent."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = fields.find(f"tokenizer.ggml.{key}_token_id", int)
        token_id = ids.get(key) if token_id is None else token_id
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise damaged(path, f"its {name} token is number {token_id} of {len(tokens)}")
        config[f"{name}_token"] = tokens[token_id]
    if templates := _chat_templates(fields):
        config["chat_template"] = templates
    return config


def _chat_templates(fields: Fields) -> dict[str, str]:
    """Return the templates by name: the file's own, and those of `tokenizer.chat_templates`."""
    own = fields.find("tokenizer.chat_template", str)
    names = fields.find_items("tokenizer.chat_templates", str)
    named = {name: fields.get(f"tokenizer.chat_template.{name}", str) for name in names}
    return named if own is None else {"default": own} | named
