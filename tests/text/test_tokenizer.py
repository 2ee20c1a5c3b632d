"""The tokenizer against transformers, the tokenizers library and Unicode itself."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tokenizers import (
    Regex,
    Tokenizer as BackendTokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer

from moescope.errors import UserError
from moescope.text.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TEXTS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 20,
    "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 20,
    "def add(first, second):\n    return first + second\n\n\n" * 20,
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12+34=?"},
    {"role": "assistant", "content": "<think>2+4=6\n1+3=4</think>46"},
    {"role": "user", "content": "再来一个"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_on_texts(TEXTS, vocab_size=380, progress=False)


@pytest.fixture(scope="module")
def deepseek_v3_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary built as DeepSeek-V3's files are."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL_TOKENS[:5]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("deepseek")
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% set ns = namespace(is_first=false) %}\n"
        "{{bos_token}}{%- for message in messages %}\n"
        "  {% if message['role'] == 'user' %}\n"
        "{{'<｜User｜>' + message['content']}}{%- endif %}\n"
        "  {%- if message['role'] == 'tool' %}{{ message | tojson }}{% continue %}{% endif %}\n"
        "  {%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{{'<｜Assistant｜>' + message['content'] + eos_token}}{%- endif %}\n"
        "{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": SPECIAL_TOKENS[0], "lstrip": False},
        "eos_token": {"__type": "AddedToken", "content": SPECIAL_TOKENS[1], "lstrip": False},
        "pad_token": {"__type": "AddedToken", "content": SPECIAL_TOKENS[1], "lstrip": False},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def word_marks() -> Tokenizer:
    """A vocabulary that marks words with ▁ and spells rare characters as bytes (Llama 2's way)."""
    backend = BackendTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[1:2], trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer(BackendTokenizer.from_str(json.dumps(plain)), {"bos_token": "<s>"})


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.special_ids == set(range(7))
    assert tokenizer.vocab_size == 380
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(range(7))
    assert tokenizer.encode("a", add_special_tokens=True) == [0, *tokenizer.encode("a")]


def test_digits_stand_alone_and_chinese_apart_from_latin(tokenizer: Tokenizer) -> None:
    spelled = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("1234+5")]
    assert spelled == ["1", "2", "3", "4", "+", "5"]
    mixed = tokenizer.encode("明月man明月")
    assert mixed == [*tokenizer.encode("明月"), *tokenizer.encode("man"), *tokenizer.encode("明月")]


@given(text=st.text())
def test_every_string_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@given(ids=st.lists(st.integers(0, 379), max_size=40), skip=st.booleans())
def test_stream_joins_to_decode(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_ids_beyond_the_vocabulary_spell_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("明月")
    decoder = StreamDecoder(tokenizer)
    made = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 9]
    assert "".join(map(decoder.feed, made)) + decoder.flush() == "明月"
    assert tokenizer.decode(made) == "明月"


@given(text=st.text(max_size=30))
def test_stream_never_cuts_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.feed(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


@given(text=st.text(alphabet="aein tru 明月🙂\ufffd", max_size=20))
def test_stream_of_a_vocabulary_with_word_marks(word_marks: Tokenizer, text: str) -> None:
    ids = [1, *word_marks.encode(text), 1, *word_marks.encode(text)]
    stream = StreamDecoder(word_marks)
    streamed = "".join(stream.feed(token_id) for token_id in ids) + stream.flush()
    assert streamed == word_marks.decode(ids)


def test_saved_tokenizer_opens_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in [*TEXTS, "naïve 🙂 3.14\r\n\r\n\tx", "<｜User｜>12+34=?<｜Assistant｜><think>"]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert again.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(
            tokenizer.encode(text), skip_special_tokens=False
        )
    assert again.hash == tokenizer.hash
    for prompt in (False, True):
        assert again.apply_chat_template(
            MESSAGES, add_generation_prompt=prompt
        ) == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)


def test_chat_form(tokenizer: Tokenizer) -> None:
    assert tokenizer.apply_chat_template(MESSAGES) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>12+34=?<｜Assistant｜>46<｜end▁of▁sentence｜>"
        "<｜User｜>再来一个<｜Assistant｜>"
    )


def test_deepseek_v3_structure_against_transformers(deepseek_v3_like: Path) -> None:
    ours = Tokenizer.load(deepseek_v3_like / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(deepseek_v3_like)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 1)
    messages = [*MESSAGES[1:], {"role": "tool", "content": "结果 <b>"}]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
        assert ours.encode(expected) == theirs.encode(expected, add_special_tokens=False)


def test_template_beside_the_files_wins(deepseek_v3_like: Path, tmp_path: Path) -> None:
    for file in deepseek_v3_like.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') | length }}")
    assert Tokenizer.load(tmp_path).apply_chat_template([]) == "4"


def test_training_reads_folders(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        folder = tmp_path / "train" / f"domain{number}"
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "held_out").mkdir()
    assert Tokenizer.train(tmp_path, vocab_size=300, progress=False).vocab_size == 300


@pytest.mark.parametrize(
    ("size", "words"), [(100, "263"), (200_000, "102400"), (5_000, "smaller vocabulary")]
)
def test_training_refuses(size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tokenizer.train_on_texts(TEXTS, vocab_size=size, progress=False)


def test_loading_refuses(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_chat_refuses(tokenizer: Tokenizer, word_marks: Tokenizer) -> None:
    with pytest.raises(UserError, match="role system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}])
    with pytest.raises(UserError, match="refuses these messages"):
        tokenizer.apply_chat_template([{"role": "user"}])
    with pytest.raises(UserError, match="no chat template"):
        word_marks.apply_chat_template(MESSAGES)


def test_template_cannot_leave_the_sandbox(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__base__ }}")
    with pytest.raises(UserError, match="unsafe"):
        Tokenizer.load(tmp_path).apply_chat_template(MESSAGES)


def test_broken_text_and_unknown_ids(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="broken characters"):
        tokenizer.encode("\ud800")
    with pytest.raises(UserError, match="ids run from 0 to 379"):
        tokenizer.token_bytes(380)
