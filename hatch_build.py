"""The package's own build: the page and the native kernels are made before files are gathered."""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STEPS = {"web/build.py": "build_page", "csrc/build.py": "build_native"}
"""Script -> its function of the project's root; each says in a sentence what it leaves out."""


class BuildHook(BuildHookInterface):
    """Runs the steps, for a wheel as for an editable installation; a source archive has the page.

    So an archive builds where there is no Node, and holds no code for one kind of machine.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self._run("web/build.py", root)
        if self.target_name != "wheel":
            return
        extension: Path | None = self._run("csrc/build.py", root)
        if extension is None:
            return
        build_data["artifacts"].append(extension.relative_to(root).as_posix())
        build_data["pure_python"] = False  # the wheel is for this kind of machine alone
        build_data["infer_tag"] = True

    def _run(self, script: str, root: Path) -> Any:
        spec = importlib.util.spec_from_file_location(STEPS[script], root / script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, STEPS[script])(root)
