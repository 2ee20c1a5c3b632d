"""What `make sanitize` runs, which takes minutes, can at least be compiled at any time."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_exercise_of_the_sanitizers_compiles() -> None:
    check = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{CSRC}"]
    subprocess.run([*check, str(CSRC / "tests" / "exercise.cpp")], check=True)
