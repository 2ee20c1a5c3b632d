"""The description of the API that the page's types are made from."""

import json
import runpy
from pathlib import Path

import pytest

from moescope.server.contract import ENDPOINTS, openapi

WEB = Path(__file__).parents[2] / "web"


@pytest.mark.skipif(not WEB.is_dir(), reason="the page's source is in a checkout only")
def test_the_committed_description_is_current() -> None:
    current = runpy.run_path(str(WEB / "openapi.py"))["text"]()
    committed = (WEB / "openapi.json").read_text(encoding="utf-8")
    assert committed == current, "run `python web/openapi.py` and commit web/openapi.json"


def test_every_reference_is_defined_and_every_endpoint_described() -> None:
    document = openapi()
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()
    assert list(document["paths"]) == [endpoint.path for endpoint in ENDPOINTS]
