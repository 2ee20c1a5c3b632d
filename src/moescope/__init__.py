"""moescope: train, run and see into mixture-of-experts language models of the DeepSeek kind.

    import moescope

    model = moescope.load("tiny")
    print(model.generate("春眠不觉晓，", max_tokens=24).text)

Nothing heavy is imported until a name is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.api import Model, load
    from moescope.config import ModelConfig
    from moescope.engine.engine import Generation
    from moescope.engine.sequence import Token
    from moescope.errors import UserError
    from moescope.lab.plan import Plan, plan
    from moescope.scope.trace import Trace
    from moescope.text.tokenizer import Tokenizer

__version__ = version("moescope")
__all__ = [
    "Generation",
    "Model",
    "ModelConfig",
    "Plan",
    "Token",
    "Tokenizer",
    "Trace",
    "UserError",
    "load",
    "plan",
]

_HOMES = {
    "Generation": "moescope.engine.engine",
    "Model": "moescope.api",
    "ModelConfig": "moescope.config",
    "Plan": "moescope.lab.plan",
    "Token": "moescope.engine.sequence",
    "Tokenizer": "moescope.text.tokenizer",
    "Trace": "moescope.scope.trace",
    "UserError": "moescope.errors",
    "load": "moescope.api",
    "plan": "moescope.lab.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moescope' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
