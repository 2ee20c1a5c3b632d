"""Small vocabularies in GGUF files without weights, as llama.cpp opens them for their tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer, models, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
TYPES = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 3
USER_DEFINED = ["<think>", "\t\t"]
WORDS = [
    *("\r\n", "\n", "\n\n", "  ", " ", "\t", "   ", "'s", "'LL", "'", "A", "the", " moon", "Moon"),
    *(
        "getHTTPResponse",
        "É",
        "naïve",
        "12",
        "3",
        "2024",
        "４",
        "½",
        "!",
        "，",
        "。",
        " (",
        "_",
        "$",
    ),
    *(
        "«",
        "—",
        "...",
        "/",
        "++",
        "<=",
        "`",
        "月",
        "床前",
        "ひ",
        "カ",
        "ー",
        "한국",
        "Ж",
        "мир",
        "ß",
    ),
    *(
        "µ",
        "e\u0301",
        "हिन्दी",
        "ไทย",
        "العربية",
        "😀",
        "👍🏽",
        "👨‍👩‍👧",
        "\u00a0",
        "\u3000",
        "\u200b",
        "𝕏",
    ),
]
PIECES = [*WORDS, *SPECIAL, *USER_DEFINED]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=12))


def byte_level_tokens() -> tuple[list[str], list[str]]:
    """Return tokens and merges learned from uncut text, so that merges tell where rules cut."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    pairs = [left + right for left in WORDS for right in WORDS]
    backend.train_from_iterator(pairs + [word * 2 for word in WORDS] * 3, trainer)
    made = json.loads(backend.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in made["merges"]]


def sentencepiece_tokens() -> tuple[list[str], list[float]]:
    """Return tokens and scores: bytes, characters, and words that grow by one merge a token."""
    backend = BackendTokenizer(models.BPE())
    text = [word.replace(" ", "▁") for word in WORDS if word.isprintable()]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False)
    backend.train_from_iterator(
        ["▁" + left + right for left in text for right in text if "😀" not in left], trainer
    )
    vocabulary = json.loads(backend.to_str())["model"]["vocab"]
    learned = sorted(vocabulary, key=vocabulary.__getitem__)
    characters = [token for token in learned if len(token) == 1]
    longer = [token for token in learned if len(token) > 1]
    head = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *longer, *characters]  # as SentencePiece orders them
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(tokens) - len(head))]
    return tokens, scores


def write_vocabulary(
    path: Path,
    kind: str,
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    pre: str | None = None,
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    **more: Any,
) -> Path:
    """Write a file without weights; `more` are keys of `tokenizer.ggml`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *USER_DEFINED])
    writer.add_token_types([*types, *[gguf.TokenType.USER_DEFINED] * len(USER_DEFINED)])
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores([*scores, *[0.0] * len(USER_DEFINED)])
    for key, value in more.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
