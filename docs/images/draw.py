"""Take the READMEs' pictures of `moescope explain`: `python docs/images/draw.py`.

Needs Chromium, and the fonts DejaVu Sans Mono and Noto Sans Mono CJK: in the latter a Chinese
character is as wide as two Latin ones, as in a terminal.
"""

import io
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from rich.console import Console
from rich.terminal_theme import MONOKAI

import moescope
from moescope.cli.drawing import draw

HERE = Path(__file__).parent
SENTENCES = {
    "explain.en.png": "It is a truth universally acknowledged, that a single man",
    "explain.zh.png": "床前明月光，疑是地上",
}
PAGE = """<!DOCTYPE html><meta charset="utf-8"><style>
@font-face {{ font-family: half; src: local("DejaVu Sans Mono"); size-adjust: 83.06%;
              unicode-range: U+2500-25FF, U+23CE, U+2423 }}
body {{ margin: 24px; background: #1c1c1c; color: #d8d8d8 }}
pre {{ font: 15px/21px half, "Noto Sans Mono CJK SC"; white-space: pre; margin: 0 }}
{stylesheet}
</style><pre>{code}</pre>"""


def main() -> None:
    model = moescope.load("tiny")
    for name, sentence in SENTENCES.items():
        console = Console(
            record=True, width=80, highlight=False, force_terminal=True, file=io.StringIO(),
            color_system="truecolor",
        )  # fmt: skip
        draw(model.trace(sentence, max_tokens=12), model.tokenizer, console)
        page = console.export_html(code_format=PAGE, theme=MONOKAI, inline_styles=True)
        photograph(page, HERE / name)


def photograph(page: str, target: Path) -> None:
    """Render a page in Chromium and cut off the empty margin."""
    with tempfile.TemporaryDirectory() as scratch:
        html, shot = Path(scratch) / "page.html", Path(scratch) / "page.png"
        html.write_text(page, encoding="utf-8")
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--window-size=740,1600", f"--screenshot={shot}", html.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        picture = Image.open(shot).convert("RGB")
        ground = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
        _, _, _, bottom = ImageChops.difference(picture, ground).getbbox() or (0, 0, 0, 1600)
        cut = picture.crop((0, 0, picture.width, min(picture.height, bottom + 24)))
        cut.quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main()
