r"""How the vocabularies of GGUF files cut text before merging, by the name that files give it.

The rules are those by which llama.cpp cuts, since files are made for it: each pattern cuts what
the one before it left, and what no pattern matches is a piece, too. Where llama.cpp is coarser than
the model's own tokenizer (it tells capitals apart in ASCII alone for `gpt-4o` and its like, and not
at all for `kimi-k2`), so are they.
"""

from dataclasses import dataclass, replace

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # It's, don't, we'll
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
_HAN = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{f900}-\x{faff}\x{20000}-\x{2a6df}"
    r"\x{2a700}-\x{2b73f}\x{2b740}-\x{2ebef}\x{2f800}-\x{2fa1f}"
)
_CASED_LETTERS = (  # without those that are rare or young
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8a}\x{2d00}-\x{2d2d}"
    r"\x{a790}-\x{a7ff}\x{ab30}-\x{ab68}\x{10570}-\x{105bc}\x{10d50}-\x{10d85}"
    r"\x{16e40}-\x{16e7f}\x{1d400}-\x{1df2a}]]"
)
_HAN_KANA_HANGUL = r"[一-龥ࠀ-一가-퟿&&\S]+"
_HAN_KANA = "[一-龥぀-ゟ゠-ヿ]+"


def _words(numbers: str, *, letters: str = _LETTERS, marks: str = "") -> str:
    """Words with one mark or blank before them, and numbers of so many digits.

    `marks` are taken for letters where a piece is all but letters.
    """
    rest = _REST.replace(r"\p{L}\p{N}]", rf"\p{{L}}{marks}\p{{N}}]")
    return f"{_SHORT}|{letters}|{numbers}|{rest}"


def _cased(numbers: str, short: str) -> str:
    """As `_words`, but a capital begins another, and what is shortened stays with its word."""
    begin, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
    words = f"{begin}{upper}*{lower}+{short}|{begin}{upper}+{lower}*{short}"
    rest = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
    return f"{words}|{numbers}|{rest}"


@dataclass(frozen=True)
class PreTokenizer:
    """Rules by which text is cut, and what else llama.cpp ties to their name.

    Attributes:
        splits: patterns in Oniguruma's language, in order.
        takes_whole_words: whether a piece that is a token is not merged but taken.
        adds_bos: whether a text begins with the begin token where a file does not say.
    """

    splits: tuple[str, ...]
    takes_whole_words: bool = False
    adds_bos: bool = False


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT_2_KIND = PreTokenizer((_GPT_2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT_2))
_THREE_DIGITS = PreTokenizer((_words(r"\p{N}{1,3}"),))
_LLAMA_3 = replace(_THREE_DIGITS, takes_whole_words=True, adds_bos=True)
_QWEN_2 = PreTokenizer((_words(r"\p{N}"),))
_QWEN_35 = PreTokenizer(
    (_words(r"\p{N}", letters=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", marks=r"\p{M}"),)
)
_GPT_4O = PreTokenizer((_cased(r"\p{N}{1,3}", f"{_SHORT}?"),))
_TEKKEN = PreTokenizer((_cased(r"\p{N}", ""),), takes_whole_words=True, adds_bos=True)
_DEEPSEEK_LLM = PreTokenizer(
    (
        r"[\r\n]",
        rf"\s?{_CASED_LETTERS}+",
        r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
        r"\s+$",
        _HAN_KANA_HANGUL,
        r"\p{N}+",
    )
)
_DEEPSEEK_CODER = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_KANA_HANGUL, r"\p{N}"))
_DEEPSEEK_V3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        _HAN_KANA,
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        rf"|\s*[\r\n]+|{_SPACES}",
    )
)
_KIMI_K2 = PreTokenizer(
    (rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_SHORT}?|\p{{N}}{{1,3}}|{_REST}",)
)
_BAILING = PreTokenizer((_words(r"\p{N}").replace(r"\s*[\r\n]+", r"\s*[\r\n]"),))
_SEED_CODER = PreTokenizer(
    (rf"{_SHORT}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",)
)
_FALCON = PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama-bpe": _LLAMA_3,
    "lfm2": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "llama4": _GPT_4O,
    "dbrx": _THREE_DIGITS,
    "smaug-bpe": _THREE_DIGITS,
    "glm4": _THREE_DIGITS,
    "chatglm-bpe": _THREE_DIGITS,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "joyai-llm": _DEEPSEEK_V3,
    "deepseek-r1-qwen": _QWEN_2,
    "qwen2": _QWEN_2,
    "hunyuan": _QWEN_2,
    "megrez": _QWEN_2,
    "grok-2": _QWEN_2,
    "solar-open": _QWEN_2,
    "stablelm2": _QWEN_2,
    "qwen35": _QWEN_35,
    "kimi-k2": _KIMI_K2,
    "gpt-4o": _GPT_4O,
    "minimax-m2": _GPT_4O,
    "tekken": _TEKKEN,
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "llada-moe": _BAILING,
    "seed-coder": _SEED_CODER,
    "falcon": _FALCON,
    "gpt-2": _GPT_2_KIND,
    "phi-2": _GPT_2_KIND,
    "mpt": _GPT_2_KIND,
    "olmo": _GPT_2_KIND,
    "jais": _GPT_2_KIND,
    "trillion": _GPT_2_KIND,
    "exaone4": _GPT_2_KIND,
    "modern-bert": _GPT_2_KIND,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "smollm": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
}
"""By `tokenizer.ggml.pre`."""
