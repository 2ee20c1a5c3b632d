"""Published tokenizers of every kind give a text the ids that transformers gives it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer as BackendTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

import moescope
from moescope.errors import UserError
from moescope.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
TEXT = "It is a truth universally acknowledged, that a man. 床前明月光，疑是地上霜。 1234\n\n"
PIECES = [
    "It",
    " is",
    "  ",
    "\n",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<think>",
    "月光",
    "é",
    "🙂",
    "12",
    "x",
]


def byte_level() -> BackendTokenizer:
    """As GPT-2's line spells: the 256 bytes are the alphabet."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def word_marks() -> BackendTokenizer:
    """As Llama 2's file spells: \u2581 before each word, and rare characters in bytes."""
    backend = BackendTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(["It is a truth universally acknowledged"], trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
    return BackendTokenizer.from_str(json.dumps(plain))


def around(begin: str | None, end: str | None = None) -> Any:
    tokens = [token for token in (begin, end) if token]
    single = f"{begin + ' ' if begin else ''}$A{' ' + end if end else ''}"
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, SPECIAL.index(token)) for token in tokens]
    )


POSTS: dict[str, Any] = {
    "nothing": None,
    "offsets": processors.ByteLevel(trim_offsets=False),
    "begin": around("<s>"),
    "begin and end": around("<s>", "</s>"),
    "in turn": processors.Sequence([processors.ByteLevel(), around("<s>")]),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
}
NAMED: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
CONFIGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "named": NAMED,
    "says begin": NAMED | {"add_bos_token": True},
    "says no begin": NAMED | {"add_bos_token": False, "add_eos_token": True},
    "fast": NAMED | {"tokenizer_class": "PreTrainedTokenizerFast"},
    "llama": NAMED | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"},
    "llama, old": NAMED | {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    "llama, no space": NAMED | {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "wrapped": {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}},
    "more tokens": NAMED
    | {
        "added_tokens_decoder": {"9000": {"content": "<think>", "special": False}},
        "additional_special_tokens": ["is"],
    },
    "a token of its own": NAMED | {"image_token": "truth", "extra_special_tokens": ["man"]},
}


def folder_with(
    folder: Path,
    backend: BackendTokenizer,
    config: dict[str, Any] | None,
    model_type: str | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_same_ids(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)

    @settings(max_examples=20)
    @given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
    def same(text: str) -> None:
        assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids

    same()


CASES = [("begin", config) for config in CONFIGS]
CASES += [(post, config) for post in POSTS for config in ("llama", "says begin", "says no begin")]


@pytest.mark.parametrize(("post", "config"), CASES)
@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_ids_are_those_of_transformers(make: Any, post: str, config: str, tmp_path: Path) -> None:
    backend = make()
    if POSTS[post] is not None:
        backend.post_processor = POSTS[post]
    assert_same_ids(folder_with(tmp_path, backend, CONFIGS[config]))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "ernie4_5_moe", "deepseek_v3"])
@pytest.mark.parametrize("config", ["llama", "fast"])
def test_the_kind_of_model_decides_over_the_class(
    model_type: str, config: str, tmp_path: Path
) -> None:
    assert_same_ids(folder_with(tmp_path, word_marks(), CONFIGS[config], model_type))


def test_special_tokens_of_older_files(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"})
    told = {"bos_token": "<s>", "eos_token": {"content": "truth", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(told))
    assert_same_ids(folder)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, tokenizer.encode("truth")[0])


def test_a_file_that_cuts_off_or_fills_up_does_neither(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    assert_same_ids(folder_with(tmp_path, backend, NAMED))


def test_saved_again_it_gives_the_same_ids(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        backend = word_marks()
        backend.post_processor = POSTS["begin"]
        first = folder_with(tmp_path / name, backend, config)
        opened = Tokenizer.load(first)
        opened.save(first / "again")
        theirs, again = (
            AutoTokenizer.from_pretrained(first / "again"),
            Tokenizer.load(first / "again"),
        )
        for text in (TEXT, "<s>It is", " is"):
            expected = opened.encode(text, add_special_tokens=True)
            assert again.encode(text, add_special_tokens=True) == expected
            assert theirs(text).input_ids == expected


def test_the_models_in_the_box_begin_as_they_were_trained() -> None:
    for name in ("tiny", "tiny-dense", "tiny-unbalanced"):
        model = moescope.load(name)
        text = "床前明月光"
        assert model.engine.encode(text) == [model.tokenizer.bos_id, *model.tokenizer.encode(text)]


def test_what_is_trained_here_begins_so_in_transformers_too(tmp_path: Path) -> None:
    ours = Tokenizer.train_on_texts([TEXT * 20], 300, progress=False)
    ours.save(tmp_path)
    expected = [ours.bos_id, *ours.encode("It is")]
    assert AutoTokenizer.from_pretrained(tmp_path)("It is").input_ids == expected
    assert Tokenizer.load(tmp_path).hash == ours.hash


def test_the_hash_is_of_the_vocabulary_not_of_what_is_set_around(tmp_path: Path) -> None:
    plain, begun = byte_level(), byte_level()
    begun.post_processor = POSTS["begin"]
    assert Tokenizer(plain, {}).hash == Tokenizer(begun, {}).hash
    begun.add_tokens([AddedToken("more")])
    assert Tokenizer(plain, {}).hash != Tokenizer(begun, {}).hash


def test_refuses_a_broken_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, byte_level(), {"chat_template": [{"name": "default"}]})
    with pytest.raises(UserError, match="chat_template is neither a text nor a list"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        Tokenizer.load(folder)
