"""The package's own build: the page and the native kernels are made before files are gathered."""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STEPS = {"web/build.py": "build_page", "csrc/build.py": "build_native"}
"""Script -> its function of the project's root; each says in a sentence what it leaves out."""


class BuildHook(BuildHookInterface):
    """Runs the steps, for a wheel as for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        built: dict[str, Any] = {}
        for script, function in STEPS.items():
            spec = importlib.util.spec_from_file_location(function, root / script)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            built[function] = getattr(module, function)(root)
        if built["build_native"] is not None:  # the wheel is for this kind of machine alone
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
