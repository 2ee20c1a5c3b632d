"""Fusing chains of elementwise operations through TorchInductor, where it can compile.

Compiling costs tens of seconds once a process, so nothing is fused until a long computation
asks for it. The functions are the same either way; only rounding may differ in the last place.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_enabled = False


def compiler() -> str | None:
    """Return the path of the C++ compiler that fusing needs, or None without one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def enable_fusion() -> bool:
    """Fuse from now on; return whether this machine has the C++ compiler that it needs."""
    global _enabled
    _enabled = compiler() is not None
    return _enabled


def fused(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run `function` compiled once fusion is enabled, as it stands before that."""
    compiled: list[Callable[Parameters, Result]] = []

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not _enabled:
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **kwargs)

    return call
