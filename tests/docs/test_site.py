"""The documentation: its pictures are drawn from the code, and both languages say the same."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH_ALONE = {"numbers.md", "questions.md", "api.md"}
SHORTER = {"architecture.md"}
"""The Chinese leaves out the list of files, which changes with each of them."""
BOTH = sorted(
    page
    for page in [*DOCS.glob("*.md"), DOCS / "decisions" / "README.md", ROOT / "CONTRIBUTING.md"]
    if not page.name.endswith(".zh.md")
    and page.name not in ENGLISH_ALONE | SHORTER
    and page.exists()
)


@pytest.mark.parametrize("page", BOTH, ids=lambda page: page.name)
def test_a_page_has_the_same_parts_in_chinese(page: Path) -> None:
    chinese = page.with_suffix(".zh.md")
    assert shape(page) == shape(chinese)


def test_the_architecture_has_the_same_chapters_in_chinese() -> None:
    chapters = [
        [
            line
            for line in (DOCS / name).read_text(encoding="utf-8").splitlines()
            if line[:2] == "##"
        ]
        for name in ("architecture.md", "architecture.zh.md")
    ]
    assert len(chapters[0]) == len(chapters[1])


def shape(page: Path) -> list[str]:
    """Headings' depths, tables' rows, pictures, and commands without their comments, in order."""
    parts: list[str] = []
    fence = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = "" if fence else line
            parts.append(line)
        elif fence == "```sh":
            parts.append(re.sub(r"\s*#.*|\"[^\"]*\"", "", line))
        elif not fence and (mark := re.match(r"#+ |\|", line)):
            parts.append(mark[0])
        elif not fence and line.startswith("!["):
            parts.append("!")
    return parts


def test_pictures_of_routers_are_those_of_the_routers() -> None:
    drawing = script("routers")
    for method in drawing.ROUTERS:
        drawn = (DOCS / "images" / "routers" / f"{method}.svg").read_text(encoding="utf-8")
        assert drawn == drawing.picture(method), "run docs/images/routers.py"


def test_the_picture_of_rooms_is_that_of_the_imports() -> None:
    drawing = script("rooms")
    for place, language in enumerate(drawing.LANGUAGES):
        labels = {room: words[place] for room, words in drawing.ROOMS.items()}
        drawn = (DOCS / "images" / f"{language}.rooms.svg").read_text(encoding="utf-8")
        assert drawn == drawing.picture(labels), "run docs/images/rooms.py"


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install -e .[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for page in ("index.html", "zh/routers/index.html", "api/index.html", "zh/scaling/index.html"):
        assert (tmp_path / page).stat().st_size > 4000
    assert "<math" in (tmp_path / "routers" / "index.html").read_text(encoding="utf-8")


def script(name: str) -> Any:
    path = DOCS / "images" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
