"""Message catalogues of free programs as sentence pairs, English and Chinese."""

import gettext
import re
from collections.abc import Iterator
from pathlib import Path

from documentation import is_chinese

SHORTEST, LONGEST = 4, 700  # characters of an English message
CATALOGUES = {
    "wesnoth-1.16-data": "usr/share/games/wesnoth/1.16/locale/zh_CN/LC_MESSAGES/*.mo",
    "freeciv-data": "usr/share/locale/zh_CN/LC_MESSAGES/*.mo",
    "widelands-data": "usr/share/games/widelands/data/locale/zh_CN/LC_MESSAGES/*.mo",
    "libreoffice-l10n-zh-cn": "usr/lib/libreoffice/program/resource/zh_CN/LC_MESSAGES/*.mo",
}
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|~(?=\w)|\(~?[A-Z]\)")


def pairs(folders: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (English, Chinese) of each message once, without markup."""
    seen: set[str] = set()
    for package, pattern in CATALOGUES.items():
        for path in sorted(folders[package].glob(pattern)):
            with path.open("rb") as file:
                messages: dict[str | tuple[str, int], str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            for message, translation in messages.items():
                if not isinstance(message, str):
                    continue
                english = _plain(message.rpartition("\x04")[2])
                chinese = _plain(translation)
                if english in seen or not is_chinese(chinese):
                    continue
                if SHORTEST <= len(english) <= LONGEST and re.search(r"[a-z]{2}", english):
                    seen.add(english)
                    yield english, chinese


def _plain(message: str) -> str:
    return " ".join(MARKUP.sub("", message).split())
