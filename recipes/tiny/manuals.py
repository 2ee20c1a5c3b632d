"""Manuals of free software as text, from Debian's packages: one line a manual."""

import gzip
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from documentation import is_chinese, paragraphs, roff_text

SHORTEST = 300  # characters
LONGEST = 60_000  # characters; a longer page is a table
DOC, HELP = "usr/share/doc", "usr/share/help"


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def of_html(path: Path) -> str:
    return "\n".join(text for _, text in paragraphs(path))


def of_roff(path: Path) -> str:
    return roff_text(read(path))


def of_pod(path: Path) -> str:
    """Plain Old Documentation without its directives; indented code stays as it is."""
    text = re.sub(r"^=(?:head\d|item) *(.*)$", r"\1", read(path), flags=re.MULTILINE)
    text = re.sub(r"^=\w+.*\n", "", text, flags=re.MULTILINE)
    for _ in range(2):  # codes stand within codes
        text = re.sub(r"[BCFILSX]<([^<>]*)>", lambda m: m[1].split("|")[0], text)
    return text.replace("E<gt>", ">").replace("E<lt>", "<")


def of_mallard(path: Path) -> str:
    """GNOME's help pages: titles, and paragraphs that stand in lists or alone."""
    texts = (
        " ".join("".join(element.itertext()).split())
        for element in ElementTree.parse(path).iter()
        if element.tag.rpartition("}")[2] in ("title", "p")
    )
    return "\n".join(text for text in texts if text)


class Manual(NamedTuple):
    """Where a manual's pages lie in its package, and how a page is read."""

    package: str
    pages: str
    text: Callable[[Path], str]
    chinese: bool = False


LINUX = f"{DOC}/linux-doc-6.1/html/_sources"
MANUALS = (
    Manual("linux-doc-6.1", f"{LINUX}/**/*.rst.txt", read),
    Manual("linux-doc-6.1", f"{LINUX}/translations/zh_CN/**/*.rst.txt", read, chinese=True),
    Manual("postgresql-doc-15", f"{DOC}/postgresql-doc-15/html/*.html", of_html),
    Manual("git-doc", f"{DOC}/git-doc/**/*.txt", read),
    Manual("sqlite3-doc", f"{DOC}/sqlite3/**/*.html", of_html),
    Manual("python-django-doc", f"{DOC}/python-django-doc/html/**/*.html", of_html),
    Manual("debian-reference-en", "usr/share/debian-reference/*.en.html", of_html),
    Manual("debian-reference-zh-cn", "usr/share/debian-reference/*.zh-cn.html", of_html, True),
    Manual("maint-guide", f"{DOC}/maint-guide/html/*.html", of_html),
    Manual("maint-guide-zh-cn", f"{DOC}/maint-guide-zh-cn/html/*.html", of_html, chinese=True),
    Manual("debian-faq", f"{DOC}/debian/FAQ/*.en.html", of_html),
    Manual("debian-faq-zh-cn", f"{DOC}/debian/FAQ/*.zh-cn.html", of_html, chinese=True),
    Manual("debmake-doc", f"{DOC}/debmake-doc/html/*.en.html", of_html),
    Manual("debmake-doc", f"{DOC}/debmake-doc/html/*.zh-cn.html", of_html, chinese=True),
    Manual("developers-reference", f"{DOC}/developers-reference/**/*.html", of_html),
    Manual("debian-policy", f"{DOC}/debian-policy/policy.html/*.html", of_html),
    Manual("installation-guide-amd64", f"{DOC}/installation-guide-amd64/en/*.html", of_html),
    Manual(
        "installation-guide-amd64", f"{DOC}/installation-guide-amd64/zh_CN/*.html", of_html, True
    ),
    Manual("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", of_html),
    Manual("gimp-help-zh-cn", "usr/share/gimp/2.0/help/zh_CN/*.html", of_html, chinese=True),
    Manual("gnome-user-docs", f"{HELP}/C/**/*.page", of_mallard),
    Manual("gnome-user-docs", f"{HELP}/zh_CN/**/*.page", of_mallard, chinese=True),
    Manual("libreoffice-help-en-us", "usr/share/libreoffice/help/en-US/text/**/*.html", of_html),
    Manual(
        "libreoffice-help-zh-cn", "usr/share/libreoffice/help/zh-CN/text/**/*.html", of_html, True
    ),
    Manual("gnucash-docs", f"{HELP}/C/**/*.html", of_html),
    Manual("apache2-doc", f"{DOC}/apache2-doc/manual/en/**/*.html", of_html),
    Manual("perl-doc", "usr/share/perl/*/pod/*.pod", of_pod),
    Manual("rust-doc", f"{DOC}/rust-doc/html/*book/*.html", of_html),
    Manual("rust-doc", f"{DOC}/rust-doc/html/reference/*.html", of_html),
    Manual("vim-doc", f"{DOC}/vim/html/*.html", of_html),
    Manual("r-doc-html", f"{DOC}/r-doc-html/manual/*.html", of_html),
    Manual("manpages", "usr/share/man/man*/*.gz", of_roff),
    Manual("manpages-dev", "usr/share/man/man*/*.gz", of_roff),
)


def pages(folders: dict[str, Path]) -> Iterator[str]:
    """Yield each page once; long ones in parts, of a translation the paragraphs that are one."""
    for manual in MANUALS:
        for path in sorted(folders[manual.package].glob(manual.pages)):
            if path.is_symlink() or (not manual.chinese and "/translations/" in str(path)):
                continue
            lines = manual.text(path).split("\n")
            if manual.chinese and manual.text is not read:
                lines = [line for line in lines if is_chinese(line)]
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
            if "\ufffd" in text or (manual.chinese and not is_chinese(text)):
                continue
            if SHORTEST // (3 if manual.chinese else 1) <= len(text) <= LONGEST:
                yield text
