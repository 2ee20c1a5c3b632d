"""A GGUF file's vocabulary as a `Tokenizer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from moescope.errors import UserError
from moescope.formats.gguf.container import damaged
from moescope.formats.gguf.metadata import Fields
from moescope.text.tokenizer import Tokenizer, set_around

CONTROL, USER_DEFINED = 3, 4
"""Token types that are matched in text as a whole, not spelled by merges."""

HAN_KANA_HANGUL = "[一-龥ࠀ-一가-퟿]+"
CASED_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-llm": (
        r"[\r\n]",
        CASED_LETTERS,
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        HAN_KANA_HANGUL,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_KANA_HANGUL, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""How each kind of DeepSeek's vocabularies cuts text before merging, by `tokenizer.ggml.pre`."""


def knows_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether `tokenizer` can make something of the vocabulary's kind."""
    rules = metadata.get("tokenizer.ggml.pre")
    return metadata.get("tokenizer.ggml.model") == "gpt2" and rules in list(SPLITS)


def tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the vocabulary that metadata hold.

    Raises:
        UserError: there is none, it contradicts itself, or it is of a kind that moescope does not
            know.
    """
    fields = Fields(path, metadata)
    if not knows_vocabulary(metadata):
        model = fields.get("tokenizer.ggml.model", str)
        rules = fields.get("tokenizer.ggml.pre", str, "default")
        raise UserError(
            f"{path} holds a vocabulary of the kind {model[:40]!r} that cuts text by the rules "
            f"{rules[:40]!r}; moescope knows 'gpt2' with {', '.join(SPLITS)}: put the model's "
            "tokenizer.json beside the file"
        )
    rules = fields.get("tokenizer.ggml.pre", str)
    tokens = fields.items("tokenizer.ggml.tokens", str)
    types = fields.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise damaged(path, f"its {len(tokens)} tokens have {len(types)} types, or repeat")
    whole = {CONTROL, USER_DEFINED}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, kind in zip(tokens, types, strict=True):
        if kind not in whole and not alphabet.issuperset(token):
            raise damaged(path, f"the token {token!r} is not spelled in bytes")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in whole
    ]
    backend = BackendTokenizer(models.BPE(vocab=ids, merges=_merges(path, fields, ids)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[rules]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    config = _tokenizer_config(path, fields, tokens)
    if fields.get("tokenizer.ggml.add_bos_token", bool, False):
        set_around(backend, begin=config.get("bos_token"))
    return Tokenizer(backend, config)


def _merges(path: Path, fields: Fields, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that are merged, the first to be merged first."""
    pairs: list[tuple[str, str]] = []
    for merge in fields.items("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise damaged(path, f"the merge number {len(pairs)} is of tokens that it lacks")
        pairs.append((left, right))
    return pairs


def _tokenizer_config(path: Path, fields: Fields, tokens: list[str]) -> dict[str, Any]:
    """Return what `tokenizer_config.json` would say."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = fields.find(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise damaged(path, f"its {name} token is number {token_id} of {len(tokens)}")
        config[f"{name}_token"] = tokens[token_id]
    template = fields.find("tokenizer.chat_template", str)
    return config if template is None else config | {"chat_template": template}
