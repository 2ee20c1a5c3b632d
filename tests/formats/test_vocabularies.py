"""GGUF vocabularies of every kind cut text as llama.cpp cuts it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_vocabularies import (
    SPECIAL,
    TEXTS,
    TYPES,
    USER_DEFINED,
    byte_level_tokens,
    sentencepiece_tokens,
    write_vocabulary,
)
from hypothesis import given, settings

from moescope.errors import UserError
from moescope.formats.gguf.container import GgufFile
from moescope.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from moescope.formats.gguf.vocabulary import tokenizer
from moescope.text.tokenizer import StreamDecoder, Tokenizer

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed")
BYTE_LEVEL, SENTENCEPIECE = byte_level_tokens(), sentencepiece_tokens()
SAYS: dict[str, dict[str, bool]] = {
    "nothing": {},
    "begin": {"add_bos_token": True},
    "no begin": {"add_bos_token": False},
    "begin and end": {"add_bos_token": True, "add_eos_token": True},
}


def byte_level(folder: Path, pre: str | None, **more: Any) -> Path:
    tokens, merges = BYTE_LEVEL
    types = [*TYPES, *[gguf.TokenType.NORMAL] * (len(tokens) - len(TYPES))]
    named: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2} | more
    return write_vocabulary(
        folder / "v.gguf", "gpt2", tokens, types, pre=pre, merges=merges, **named
    )


def sentencepiece(folder: Path, **more: Any) -> Path:
    tokens, scores = SENTENCEPIECE
    types = [*TYPES, *[gguf.TokenType.BYTE] * 256]
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    return write_vocabulary(folder / "v.gguf", "llama", tokens, types, scores=scores, **more)


def opened(path: Path) -> Tokenizer:
    return tokenizer(path, GgufFile(path).metadata)


def assert_same_ids(path: Path, examples: int) -> None:
    assert llama_cpp is not None
    judge, ours = llama_cpp.Llama(str(path), vocab_only=True, verbose=False), opened(path)

    @settings(max_examples=examples)
    @given(TEXTS)
    def same(text: str) -> None:
        expected = judge.tokenize(text.encode(), add_bos=True, special=True)
        assert ours.encode(text, add_special_tokens=True) == expected
        decoder = StreamDecoder(ours, skip_special_tokens=False)
        ids = ours.encode(text)
        streamed = "".join(map(decoder.feed, ids)) + decoder.flush()
        assert streamed == ours.decode(ids, skip_special_tokens=False)
        if ours.is_byte_level:
            assert streamed == text

    same()


@needs_llama_cpp
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_cut_as_llama_cpp_cuts_it(pre: str, tmp_path: Path) -> None:
    first = next(name for name, rules in PRE_TOKENIZERS.items() if rules == PRE_TOKENIZERS[pre])
    assert_same_ids(byte_level(tmp_path, pre), examples=200 if pre == first else 10)


@needs_llama_cpp
@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("pre", [None, "llama-bpe", "tekken", "qwen2", "glm4"])
def test_what_is_set_around_a_text_is_llama_cpps(pre: str, says: str, tmp_path: Path) -> None:
    assert_same_ids(byte_level(tmp_path, pre, **SAYS[says]), examples=5)


@needs_llama_cpp
@pytest.mark.parametrize("says", [*SAYS, "no space"])
def test_sentencepiece_merges_as_llama_cpp_does(says: str, tmp_path: Path) -> None:
    said = {"add_space_prefix": False} if says == "no space" else SAYS[says]
    assert_same_ids(sentencepiece(tmp_path, **said), examples=300)


def test_sentencepiece_spells_in_characters_and_bytes(tmp_path: Path) -> None:
    ours = opened(sentencepiece(tmp_path))
    assert (ours.bos_id, ours.eos_id, ours.begin_ids) == (1, 2, (1,))
    ids = ours.encode("the moon 🦉")
    assert b"".join(map(ours.token_bytes, ids)) == " the moon 🦉".encode()
    assert ours.decode(ids) == "the moon 🦉"
    assert ours.encode("".join(SPECIAL)) == [0, 1, 2, 3]
    assert ours.special_ids == {0, 1, 2, 3}
    assert ours.decode(ours.encode(USER_DEFINED[0])) == USER_DEFINED[0]


@pytest.mark.parametrize(
    ("kind", "pre", "words"),
    [
        ("gpt2", "afmoe", "cuts text by the rules 'afmoe', which moescope does not know"),
        ("t5", None, "of the kind 't5'; moescope knows 'gpt2' and 'llama'"),
        ("bert", None, "of the kind 'bert'"),
    ],
)
def test_refuses_what_it_does_not_know(
    kind: str, pre: str | None, words: str, tmp_path: Path
) -> None:
    tokens, merges = BYTE_LEVEL
    types = [*TYPES, *[gguf.TokenType.NORMAL] * (len(tokens) - len(TYPES))]
    path = write_vocabulary(tmp_path / "v.gguf", kind, tokens, types, pre=pre, merges=merges)
    with pytest.raises(UserError, match=f"{words}.*put the model's tokenizer.json beside"):
        opened(path)


def test_refuses_scores_that_are_too_few(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path)
    metadata = GgufFile(path).metadata
    metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"][:-1]
    with pytest.raises(UserError, match=r"tokens have \d+ scores"):
        tokenizer(path, metadata)
