"""Free documentation as text: handbooks, manual pages in Chinese, help in two languages."""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SHORTEST_PAGE = 400  # characters
SHORTEST, LONGEST = 8, 600  # characters of a paragraph that is translated
BLOCKS = {"p", "h1", "h2", "h3", "h4", "pre", "dt"}
PASSED_OVER = {"script", "style", "nav", "head"}
NAVIGATION = re.compile(r"^(Prev|上一页|Download the ebook|⏴|Next$|下一页$)")
CREDITS = re.compile(r"^\W*(跋|译者|翻译者?|中文版|译注|AUTHORS?\b|作者)")
"""Headings of manual pages behind which stand people's names and addresses."""
HELP = "usr/share/libreoffice/help/{}/text"


class _Paragraphs(HTMLParser):
    """Collects the text of each block of a page, with its id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, str]] = []
        self._id, self._parts, self._skipped = "", list[str](), 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in PASSED_OVER:
            self._skipped += 1
        elif tag in BLOCKS:
            self._end()
            self._id = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag in PASSED_OVER:
            self._skipped = max(0, self._skipped - 1)
        elif tag in BLOCKS:
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._parts.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._parts).split())
        if text:
            self.found.append((self._id, text))
        self._id, self._parts = "", []


def paragraphs(page: Path) -> list[tuple[str, str]]:
    """Return (id, text) of each paragraph and heading of an HTML page."""
    parser = _Paragraphs()
    parser.feed(page.read_text(encoding="utf-8", errors="replace"))
    return parser.found


def debian_handbook(package: Path, language: str) -> Iterator[str]:
    """Yield the Debian Administrator's Handbook, one document a page, in `en-US` or `zh-CN`.

    Of a translation only paragraphs that are translated are kept.
    """
    folder = package / "usr/share/doc/debian-handbook/html" / language
    for page in sorted(folder.glob("*.html")):
        texts = [text for _, text in paragraphs(page) if not NAVIGATION.match(text)]
        if language == "zh-CN":
            texts = [text for text in texts if is_chinese(text)]
        document = "\n".join(texts)
        if len(document) >= (SHORTEST_PAGE if language == "en-US" else SHORTEST_PAGE // 2):
            yield document


def chinese_man_pages(package: Path) -> Iterator[str]:
    """Yield the manual pages that are translated into simplified Chinese, as plain text."""
    for page in sorted((package / "usr/share/man/zh_CN").rglob("*.gz")):
        if page.is_symlink():
            continue
        source = gzip.decompress(page.read_bytes()).decode("utf-8", "replace")
        text = _without_credits(roff_text(source))
        if len(text) >= SHORTEST_PAGE // 2 and is_chinese(text) and "\ufffd" not in text:
            yield text


def _without_credits(text: str) -> str:
    """Drop sections about people, wherever they stand, and lines with addresses."""
    kept: list[str] = []
    is_credit = follows_gap = False
    for line in text.split("\n"):
        if follows_gap:  # a heading
            is_credit = CREDITS.match(line) is not None
        follows_gap = not line
        if not is_credit and "@" not in line and "man-pages-zh" not in line:
            kept.append(line)
    return "\n".join(kept).strip()


def roff_text(source: str) -> str:
    """Return a manual page without its typesetting: a line a paragraph, headings by themselves."""
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*source.splitlines(), ".PP"]:
        request, _, rest = line.partition(" ")
        if not line.startswith((".", "'")):
            paragraph.append(_unescaped(line))
        elif request in (".B", ".I", ".BR", ".IR", ".RB", ".RI", ".BI", ".IB", ".SM"):
            words = re.findall(r'"([^"]*)"|(\S+)', rest)
            joint = "" if len(request) == 3 else " "
            paragraph.append(_unescaped(joint.join(quoted or plain for quoted, plain in words)))
        elif request in (".SH", ".SS", ".PP", ".P", ".LP", ".TP", ".IP", ".HP", ".br", ".sp"):
            if text := " ".join(" ".join(paragraph).split()):
                lines.append(text)
            paragraph = []
            if request in (".SH", ".SS") and rest:
                lines += ["", _unescaped(rest.strip('" '))]
    return "\n".join(lines).strip()


def _unescaped(text: str) -> str:
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)", "", text)
    text = re.sub(r"\\(?:\((?:lq|rq)|\[(?:lq|rq)\])", '"', text)
    text = text.replace(r"\-", "-").replace(r"\e", "\\").replace(r"\&", "").replace(r"\/", "")
    return re.sub(r"\\[,|^% ]|\\s[-+]?\d|\\\(..", "", text)


def help_pairs(english: Path, chinese: Path) -> Iterator[tuple[str, str]]:
    """Yield (English, Chinese) paragraphs of LibreOffice's help, found by their ids.

    What is left in English in both, and what is not a sentence, is passed over.
    """
    seen: set[str] = set()
    theirs = chinese / HELP.format("zh-CN")
    ours = english / HELP.format("en-US")
    for page in sorted(ours.rglob("*.html")):
        translated = theirs / page.relative_to(ours)
        if not translated.exists():
            continue
        by_id = {name: text for name, text in paragraphs(translated) if name}
        for name, text in paragraphs(page):
            other = by_id.get(name, "")
            if text in seen or not name or not is_chinese(other):
                continue
            if SHORTEST <= len(text) <= LONGEST and 3 <= len(other) <= LONGEST:
                seen.add(text)
                yield text, other


def is_chinese(text: str) -> bool:
    """Whether at least as many characters are Chinese as are Latin letters."""
    chinese = len(re.findall(r"[一-鿿]", text))
    return chinese > 0 and chinese >= len(re.findall(r"[A-Za-z]", text))
