"""Draw the package's rooms from its own imports: `python docs/images/rooms.py`.

A room stands one row above the highest of those that it imports, so imports point downwards, and
rooms that import each other are an error here.
"""

import ast
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "src" / "moescope"
ROOMS = {
    "cli": ("one file a verb", "一个命令一个文件"),
    "server": ("the page, and the APIs of others", "页面，以及通用的 API"),
    "lab": ("questions with numbers for answers", "用数字回答的问题"),
    "export": ("for other engines", "给别的引擎"),
    "api": ("moescope.load", "moescope.load"),
    "training": ("text into weights", "从文本到权重"),
    "scope": ("computation into things to look at", "把计算变成可看的东西"),
    "engine": ("prompts into text", "从提示到文本"),
    "native": ("the network on native kernels", "跑在原生内核上的网络"),
    "quantization": ("models, rounded", "量化后的模型"),
    "checkpoint": ("files into a network, and back", "文件与网络互转"),
    "catalog": ("published shapes", "已发布的模型尺寸"),
    "model": ("the one definition of the network", "网络的唯一定义"),
    "formats": ("safetensors, GGUF, the Hub", "safetensors、GGUF、Hub"),
    "families": ("one file a family", "一个家族一个文件"),
    "text": ("text into tokens, and back", "文本与词元互转"),
    "kernels": ("what the network computes with", "网络用来计算的内核"),
    "machine": ("what this machine has", "这台机器有什么"),
    "config": ("the network's switches", "网络的各种开关"),
    "files": ("written whole or not at all", "要么写全，要么不写"),
    "errors": ("UserError", "UserError"),
}
"""Room -> what it is for, in English and Chinese; helpers of one room are left out."""
LANGUAGES = ("en", "zh")

WIDTH, HEIGHT, BOX, TALL, GAP = 960, 60, 210, 44, 14
INK, FILL, LINE = "#263238", "#e0f2f1", "#00897b"


def main() -> None:
    for place, language in enumerate(LANGUAGES):
        labels = {room: words[place] for room, words in ROOMS.items()}
        (HERE / f"{language}.rooms.svg").write_text(picture(labels), encoding="utf-8")


def picture(labels: dict[str, str]) -> str:
    """Return the SVG: a row for each level, the highest above."""
    imports = {room: imported(room) & ROOMS.keys() - {room} for room in ROOMS}

    @cache
    def level(room: str) -> int:
        return 1 + max(map(level, imports[room]), default=-1)

    rows: list[list[str]] = [[] for _ in range(1 + max(map(level, ROOMS)))]
    for room in ROOMS:
        rows[-1 - level(room)].append(room)
    height = len(rows) * HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" text-anchor="middle" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
        f'<path d="M24 {GAP}V{height - GAP - 8}m-6 0h12l-6 8z" stroke="{LINE}" fill="{LINE}"/>',
    ]
    for row, rooms in enumerate(rows):
        left = (WIDTH + 24 - len(rooms) * (BOX + GAP) + GAP) / 2
        for place, room in enumerate(rooms):
            x, y = left + place * (BOX + GAP), GAP + row * HEIGHT
            middle = x + BOX / 2
            parts += [
                f'<rect x="{x:g}" y="{y}" width="{BOX}" height="{TALL}" rx="6" fill="{FILL}" '
                f'stroke="{LINE}"/>',
                f'<text x="{middle:g}" y="{y + 18}" font-size="14" font-weight="bold">{room}'
                "</text>",
                f'<text x="{middle:g}" y="{y + 35}" font-size="11">{labels[room]}</text>',
            ]
    return "\n".join([*parts, "</svg>\n"])


def imported(room: str) -> set[str]:
    """The rooms that a module, or any module of a folder, imports from."""
    folder = PACKAGE / room
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "moescope":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moescope."):
                found.add((node.module or "").split(".")[1])
    return found


if __name__ == "__main__":
    main()
