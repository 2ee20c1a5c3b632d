"""The description of the API that the page's types are made from."""

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from moescope.server.contract import ENDPOINTS, openapi

WEB = Path(__file__).parents[2] / "web"


@pytest.mark.skipif(not WEB.is_dir(), reason="the page's source is in a checkout only")
def test_what_the_page_takes_over_is_current() -> None:
    for name, current in runpy.run_path(str(WEB / "openapi.py"))["files"]().items():
        committed = (WEB / name).read_text(encoding="utf-8")
        assert committed == current, f"run `python web/openapi.py` and commit web/{name}"


@pytest.mark.skipif(
    not (WEB / "node_modules/openapi-typescript").is_dir(), reason="`npm ci` in web/ brings it"
)
def test_the_pages_types_are_current_and_hold(tmp_path: Path) -> None:
    """`schema.d.ts` is made anew, and svelte-check and tsc find nothing."""
    made = tmp_path / "schema.d.ts"
    tool = WEB / "node_modules/.bin/openapi-typescript"
    subprocess.run([tool, WEB / "openapi.json", "--output", made], check=True, capture_output=True)
    committed = (WEB / "src/lib/schema.d.ts").read_text(encoding="utf-8")
    assert committed == made.read_text(encoding="utf-8"), "run `npm run types` in web/"
    npm = shutil.which("npm")
    assert npm is not None, "Node 20.19 or newer has npm, which checks the page's source"
    checked = subprocess.run([npm, "run", "check"], cwd=WEB, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_reference_is_defined_and_every_endpoint_described() -> None:
    document = openapi()
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()
    assert list(document["paths"]) == [endpoint.path for endpoint in ENDPOINTS]
