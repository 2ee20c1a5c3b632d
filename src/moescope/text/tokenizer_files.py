"""The files of a published tokenizer: a text gets the ids that `transformers` gives it.

`tokenizer.json` says nearly all: how text is cut, and by its post-processor which tokens are set
around it (`add_bos_token` and `add_eos_token` beside such a file count for nothing). What
`tokenizer_config.json` adds are special tokens, and for Llama's class how a text begins.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as BackendTokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from moescope.errors import UserError
from moescope.files import read_object
from moescope.text.chat import folder_templates

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
AS_WRITTEN = ("ernie4_5_moe", "minimax_m2", "mixtral", "phimoe")
"""Models whose `tokenizer.json` counts although their configuration names Llama's class."""


def read_tokenizer(path: Path) -> tuple[BackendTokenizer, dict[str, Any]]:
    """Read a `tokenizer.json`, or the folder that holds one, and what lies beside it.

    Returns:
        What cuts text into tokens, and the configuration with all chat templates in it.

    Raises:
        UserError: a file is missing or not what its name says.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    try:
        text = file.read_text(encoding="utf-8")
        backend = BackendTokenizer.from_str(text)
    except FileNotFoundError:
        raise UserError(
            f"there is no tokenizer at {file}; give a tokenizer.json or a folder that holds one"
        ) from None
    except Exception as error:  # the library raises a bare Exception for a malformed file
        raise UserError(
            f"{file} is not a tokenizer ({error}); save or download it again"
        ) from error
    config = _read_config(folder)
    if templates := folder_templates(folder):
        config["chat_template"] = templates
    backend.no_truncation()
    backend.no_padding()
    is_byte_level = '"ByteLevel"' in text
    if not is_byte_level and _is_llama(backend, config, folder):
        _cut_as_llama(backend, config)
    _add_tokens(backend, config)
    return backend, config


def _read_config(folder: Path) -> dict[str, Any]:
    """Return `tokenizer_config.json`, with the special tokens that older files keep elsewhere."""
    file, old = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_object(file) if file.exists() else {}
    if "added_tokens_decoder" not in config and old.exists():
        config |= read_object(old)
    return config


def _is_llama(backend: BackendTokenizer, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether `transformers` cuts text by its class for Llama, not by the file's rules."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name != "LlamaTokenizer" or not isinstance(backend.model, BPE):
        return False
    model = folder / "config.json"
    return not (model.exists() and read_object(model).get("model_type") in AS_WRITTEN)


def _cut_as_llama(backend: BackendTokenizer, config: Mapping[str, Any]) -> None:
    """Mark words with ▁, at the begin of a text too, but not behind a special token.

    `legacy` marks behind special tokens as well, `add_prefix_space: false` marks no begin at all.
    """
    prefixed = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefixed else "never"
    backend.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])]
    )


def _add_tokens(backend: BackendTokenizer, config: Mapping[str, Any]) -> None:
    """Make those tokens whole that the configuration names and the file does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in (*_added_tokens(config), *_special_tokens(config)):
        if token.content not in known:
            known.add(token.content)
            backend.add_tokens([token])


def _added_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    added: dict[str, dict[str, Any]] = config.get("added_tokens_decoder") or {}
    for token_id in sorted(added, key=int):
        fields = {name: value for name, value in added[token_id].items() if name != "__type"}
        yield AddedToken(**fields)


def _special_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    own = [value for name, value in config.items() if name.endswith("_token")]
    named = [config.get(name) for name in NAMED_TOKENS]
    for token in [*named, *own, *more]:
        if isinstance(token, str | dict) and token:
            yield AddedToken(spelling(token), special=True)


def spelling(token: Any) -> str:
    """Return the spelling of a special token, which a configuration may wrap in an object."""
    return token["content"] if isinstance(token, dict) else str(token)
