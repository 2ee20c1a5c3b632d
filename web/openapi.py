"""Write what the page takes over from the server: `python web/openapi.py`.

`web/openapi.json` is what its types are made from, `web/src/lib/declared.json` has values.
"""

import json
import math
from pathlib import Path
from typing import Any, get_args

from moescope.engine.sampling import RANGES
from moescope.model.steering import Rule
from moescope.server.contract import openapi
from moescope.server.schema import MAX_NOISE, MAX_TEXT, SamplingRequest, SteeringRequest

WEB = Path(__file__).parent


def main() -> None:
    for name, text in files().items():
        (WEB / name).write_text(text, encoding="utf-8")
        print(f"wrote {WEB / name}")


def files() -> dict[str, str]:
    """The files as they are committed, by their place in this folder."""
    documents = {"openapi.json": openapi(), "src/lib/declared.json": declared()}
    return {
        name: json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }


def declared() -> dict[str, Any]:
    """Values that the server declares and the page needs before it asks."""
    return {
        "steering": SteeringRequest().model_dump(),
        "rules": get_args(Rule),
        "sampling": {
            name: {
                "least": allowed.least,
                "most": None if allowed.most == math.inf else allowed.most,
                "open": allowed.open,
                "whole": float not in (field.annotation, *get_args(field.annotation)),
            }
            for name, field in SamplingRequest.model_fields.items()
            if (allowed := RANGES.get(name)) is not None
        },
        "max_noise": MAX_NOISE,
        "max_text": MAX_TEXT,
    }


if __name__ == "__main__":
    main()
