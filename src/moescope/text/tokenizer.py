"""Text to token ids and back: train a byte-level BPE, or open any `tokenizer.json`.

Byte-level means that the 256 bytes are the alphabet, so every Unicode string has an encoding and
comes back unchanged. Special tokens and the chat form are spelled as DeepSeek spells them.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from moescope.errors import UserError
from moescope.files import write_text
from moescope.text.documents import balanced_sample

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
LARGEST_VOCABULARY = 102_400

# A digit at a time; runs of Chinese and Japanese apart from Latin words; then words with one
# leading space or mark, punctuation with the line break after it, and white space.
SPLIT_PATTERNS = (
    r"\p{N}",
    r"[一-鿿㐀-䶿豈-﫿぀-ヿ々〇]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ raise_exception('a message has the role system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Attributes:
        vocab_size: number of token ids, special tokens included.
        bos_id, eos_id, pad_id: ids of the special tokens, None where the vocabulary has none.
        adds_bos: whether a text is to begin with bos_id, as the model was taught.
        special_ids: ids that steer rather than spell: begin, end, roles, thinking.
        chat_template: Jinja source of the chat form, None where there is none.
        is_byte_level: whether tokens spell bytes (GPT-2's way, and DeepSeek's).
    """

    def __init__(self, backend: BackendTokenizer, config: Mapping[str, Any]):
        self._backend = backend
        self._config = dict(config)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.adds_bos = self.bos_id is not None and self._config.get("add_bos_token", True)
        self.chat_template: str | None = self._config.get("chat_template")
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_ids = frozenset(added)

    # --- making one ---------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        source: Path | Sequence[Path],
        vocab_size: int = 16_384,
        *,
        sample_bytes: int = 30_000_000,
        progress: bool = True,
    ) -> "Tokenizer":
        """Learn a vocabulary from a folder or files of text, every domain with an equal share.

        Raises:
            UserError: as `train_on_texts`, or there is no text.
        """
        sources = [source] if isinstance(source, Path) else source
        texts = balanced_sample(sources, sample_bytes)
        return cls.train_on_texts(texts, vocab_size, progress=progress)

    @classmethod
    def train_on_texts(
        cls, texts: Iterable[str], vocab_size: int = 16_384, *, progress: bool = True
    ) -> "Tokenizer":
        """Learn a byte-level BPE of `vocab_size` ids from `texts`.

        Raises:
            UserError: the size is not between 263 and 102,400, or the text is too little for it.
        """
        if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
            raise UserError(
                f"a vocabulary of {vocab_size} ids cannot be trained; choose a size from "
                f"{SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}"
            )
        backend = BackendTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLIT_PATTERNS]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                max_token_length=24,
                show_progress=progress,
            ),
        )
        if backend.get_vocab_size() < vocab_size:
            raise UserError(
                f"the text yields only {backend.get_vocab_size()} tokens of the {vocab_size} "
                "asked for; give more text or choose a smaller vocabulary"
            )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        return cls(backend, config)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Open a `tokenizer.json`, or the folder that holds one, with its `tokenizer_config.json`.

        A `chat_template.jinja` beside them wins over the configuration's template.

        Raises:
            UserError: a file is missing or not what its name says.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        folder = file.parent
        try:
            backend = BackendTokenizer.from_str(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"there is no tokenizer at {file}; give a tokenizer.json or a folder that holds one"
            ) from None
        except Exception as error:  # the library raises a bare Exception for a malformed file
            raise UserError(
                f"{file} is not a tokenizer ({error}); save or download it again"
            ) from error
        config_file = folder / "tokenizer_config.json"
        config: dict[str, Any] = {}
        if config_file.exists():
            try:
                parsed = json.loads(config_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{config_file} is not valid JSON ({error}); repair or remove it"
                ) from error
            if not isinstance(parsed, dict):
                raise UserError(f"{config_file} holds no JSON object; repair or remove it")
            config = cast("dict[str, Any]", parsed)
        template_file = folder / "chat_template.jinja"
        if template_file.exists():
            config["chat_template"] = template_file.read_text(encoding="utf-8")
        return cls(backend, config)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=False))
        text = json.dumps(self._config, ensure_ascii=False, indent=2)
        write_text(folder / "tokenizer_config.json", text + "\n")

    # --- text and ids -------------------------------------------------------------------------

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their single ids."""
        (ids,) = self.encode_batch([text])
        return [self._required_bos(), *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, on all cores.

        Raises:
            UserError: a text holds half a surrogate pair, which is no character.
        """
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(
                f"the text cannot be written as UTF-8 ({error}); remove the broken characters"
            ) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that form no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes that a token stands for; a special token's spelling in UTF-8.

        Raises:
            UserError: the id is not in the vocabulary.
        """
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise UserError(
                f"token id {token_id} is not in the vocabulary; ids run from 0 to "
                f"{self.vocab_size - 1}"
            )
        if token_id in self._added_ids:
            return token.encode()
        if not self.is_byte_level:
            return self.decode([token_id]).encode()
        return bytes(_BYTE_OF[character] for character in token)

    def made_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, for what a model made: none for an id beyond the vocabulary.

        Embeddings are often padded up to a round number, and nothing forbids to choose such an id.
        """
        return self.token_bytes(token_id) if token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its spelling in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def hash(self) -> str:
        """Hexadecimal SHA-256 of the vocabulary, merges and splitting rules."""
        return hashlib.sha256(self._backend.to_str(pretty=False).encode()).hexdigest()

    # --- chats --------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return `messages` ({"role": …, "content": …}) in the form that the model was taught.

        The template runs in Jinja's sandbox. `variables` (such as `tools`) are handed to it.

        Raises:
            UserError: there is no template, or it refuses the messages.
        """
        if not isinstance(self.chat_template, str):
            raise UserError("this tokenizer has no chat template; give a plain prompt instead")
        names = {
            key: _content(self._config[key])
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if self._config.get(key) is not None
        }
        try:
            return (
                _chat_environment()
                .from_string(self.chat_template)
                .render(
                    **{
                        "messages": messages,
                        "add_generation_prompt": add_generation_prompt,
                        **names,
                        **variables,
                    }
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(
                f"the chat template refuses these messages ({error}); check their roles and content"
            ) from error

    def _special_id(self, name: str) -> int | None:
        token = self._config.get(name)
        return None if token is None else self._backend.token_to_id(_content(token))

    def _required_bos(self) -> int:
        if self.bos_id is None:
            raise UserError("this tokenizer names no bos_token; encode without add_bos")
        return self.bos_id


class StreamDecoder:
    """Turn ids into text one at a time, never cutting a character in two.

    The pieces, with `flush()` at the end, join to what `decode` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._settled = 0  # ids whose text has been returned

    def feed(self, token_id: int) -> str:
        """Take one id and return the text that has become certain, perhaps ""."""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(self._spelled(token_id))
        self._ids.append(token_id)
        return self._grown(final=False)

    def flush(self) -> str:
        """Return what is left when no more ids come; an unfinished character as U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(b"", final=True)
        return self._grown(final=True)

    def _spelled(self, token_id: int) -> bytes:
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return b""
        return self._tokenizer.made_bytes(token_id)

    def _grown(self, *, final: bool) -> str:
        """Return what the unsettled ids add to the text of the last settled ones.

        A vocabulary that spells with word marks, not bytes, decodes a token by its neighbours.
        """
        before = self._decode(self._ids[: self._settled])
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and not final:
            return ""
        piece = text[len(before) :]
        if piece:
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _content(token: Any) -> str:
    """Return the spelling of a special token, which a configuration may wrap in an object."""
    return token["content"] if isinstance(token, dict) else cast("str", token)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in which a byte-level vocabulary is spelled.

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order
    (GPT-2's alphabet, which every byte-level `tokenizer.json` uses).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """Return Jinja as chat templates expect it: trimmed blocks and three helpers."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    names = cast("dict[str, Any]", environment.globals)
    names.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
