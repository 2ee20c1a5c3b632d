"""The package's own build: the page and the native kernels are made before files are gathered."""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface):
    """Builds the page, and for a wheel (an editable installation is one) the kernels.

    A source archive has the page, so it builds where there is no Node, and holds no code for one
    kind of machine. What cannot be built is left out, and a sentence says so.
    """

    def dependencies(self) -> list[str]:
        """Node, from PyPI, only where the page is yet to be built and the machine has none."""
        page = self._script("web/build.py")
        return [] if page.is_built(Path(self.root)) or page.find_npm() else [page.NODE]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self._script("web/build.py").build_page(root)
        if self.target_name != "wheel":
            return
        native = self._script("csrc/build.py")
        extension: Path | None = native.build_native(root)
        if extension is None:
            return
        build_data["artifacts"].append(extension.relative_to(root).as_posix())
        build_data["pure_python"] = False  # the wheel is for this kind of machine alone
        if native.STABLE_ABI:  # and for every Python from 3.12 on
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"cp312-abi3-{platform}"
        else:
            build_data["infer_tag"] = True

    def _script(self, path: str) -> ModuleType:
        name = path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, Path(self.root) / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
