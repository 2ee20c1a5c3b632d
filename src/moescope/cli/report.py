"""`moescope report`: what was found, as a page with charts."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Language(StrEnum):
    """Of the report."""

    ENGLISH = "en"
    CHINESE = "zh"


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.json...",
            help="What plan, specialize, ablate and compare wrote with --save, and studies' "
            "study.json.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, its charts and its data.")],
    language: Annotated[Language, typer.Option(help="Of all text.")] = Language.ENGLISH,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's path as one JSON object.")
    ] = False,
) -> None:
    """Put what was found on one page that opens anywhere, with charts as SVG and PNG beside it."""
    from moescope.lab.report import write_report

    page = write_report(files, out, language.value)
    print(json.dumps({"report": str(page)}) if as_json else page)
