"""Write `web/openapi.json`, from which the page's types are made: `python web/openapi.py`."""

import json
from pathlib import Path

from moescope.server.contract import openapi

FILE = Path(__file__).with_name("openapi.json")


def main() -> None:
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")


def text() -> str:
    """The document as it is committed."""
    return json.dumps(openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
