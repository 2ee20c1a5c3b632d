"""Text to token ids and back: train a byte-level BPE, or open any `tokenizer.json`.

Byte-level means that the 256 bytes are the alphabet, so every Unicode string has an encoding and
comes back unchanged. Special tokens and the chat form are spelled as DeepSeek spells them.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as BackendTokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from moescope.errors import UserError
from moescope.files import write_text
from moescope.text.chat import Messages, named_templates, render
from moescope.text.documents import balanced_sample
from moescope.text.tokenizer_files import NAMED_TOKENS, read_tokenizer, spelling

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
WORD_MARK = "▁"
"""SentencePiece's blank."""
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
        begin_ids, end_ids: what is set before and behind a text, as the model was taught.
        special_ids: ids that steer rather than spell: begin, end, roles, thinking.
        chat_templates: Jinja sources of the chat form by name, mostly "default" alone.
        is_byte_level: whether tokens spell bytes (GPT-2's way, and DeepSeek's).
    """

    def __init__(self, backend: BackendTokenizer, config: Mapping[str, Any]):
        self._backend = backend
        self._config = dict(config)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.begin_ids, self.end_ids = _around(backend)
        self.chat_templates = named_templates(self._config.get("chat_template"))
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
        set_around(backend, begin=BOS)
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

        A text gets the ids that `transformers` gives it. Chat templates in files of their own
        win over the configuration's.

        Raises:
            UserError: a file is missing or not what its name says.
        """
        return cls(*read_tokenizer(Path(path)))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.to_json())
        templates = [{"name": n, "template": t} for n, t in self.chat_templates.items()]
        alone = self.chat_templates.get("default") if len(templates) == 1 else None
        config = self._config | ({"chat_template": alone or templates} if templates else {})
        text = json.dumps(config, ensure_ascii=False, indent=2)
        write_text(folder / "tokenizer_config.json", text + "\n")

    def to_json(self) -> str:
        """Return what `tokenizer.json` holds."""
        return self._backend.to_str(pretty=False)

    # --- text and ids -------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their single ids.

        Args:
            text: any Unicode.
            add_special_tokens: whether `begin_ids` and `end_ids` are set around it.

        Raises:
            UserError: as `encode_batch`.
        """
        (ids,) = self.encode_batch([text], add_special_tokens=add_special_tokens)
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[list[int]]:
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
        if not add_special_tokens:
            return [encoding.ids for encoding in encodings]
        return [[*self.begin_ids, *encoding.ids, *self.end_ids] for encoding in encodings]

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
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(WORD_MARK, " ").encode()
        if not _BYTE_OF.keys() >= set(token):
            return token.encode()
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
        rules = json.loads(self._backend.to_str()) | {"post_processor": None}
        text = json.dumps(rules, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    # --- chats --------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return `messages` ({"role": …, "content": …}) in the form that the model was taught.

        All special tokens stand in the text: its ids are those of `encode` alone. The template
        runs in Jinja's sandbox. `variables` are handed to it.

        Raises:
            UserError: there is no template, or it refuses the messages.
        """
        told = self.chat_variables({"add_generation_prompt": add_generation_prompt, **variables})
        return render(self.chat_templates, messages, tools=tools, variables=told)

    def chat_variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a chat template may use besides messages: the named tokens, `variables`."""
        names = {key: spelling(self._config[key]) for key in NAMED_TOKENS if self._config.get(key)}
        return {**names, **variables}

    def _special_id(self, name: str) -> int | None:
        token = self._config.get(name)
        return None if token is None else self._backend.token_to_id(spelling(token))


def set_around(
    backend: BackendTokenizer, *, begin: str | None = None, end: str | None = None
) -> None:
    """Have every text begin and end with certain tokens, which the vocabulary holds."""
    single = [*([begin] if begin else []), "$A", *([end] if end else [])]
    tokens = {token: backend.token_to_id(token) for token in (begin, end) if token}
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(tokens.items())
    )


def _around(backend: BackendTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a post-processor sets before and behind a text."""
    encoding = backend.encode("a")
    added = encoding.special_tokens_mask
    first = next((at for at, one in enumerate(added) if not one), len(added))
    last = next((at for at, one in enumerate(reversed(added)) if not one), 0)
    return tuple(encoding.ids[:first]), tuple(encoding.ids[len(added) - last :])


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
