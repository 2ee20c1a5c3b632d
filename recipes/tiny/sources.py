"""Turning unpacked packages into documents, one reader a source."""

import html
import json
import random
import re
import struct
import subprocess
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

END = "<｜end▁of▁sentence｜>"
PART = 4000  # characters of a long text's part
OPENING = 1500  # characters of how a book begins


# --- Chinese poetry and classics -------------------------------------------------------------


def chinese_poetry(package: Path) -> Iterator[tuple[str, str]]:
    """Yield (collection, document) in simplified characters: title, dynasty and author, body.

    Tang and Song shi come in traditional characters and are converted by OpenCC (t2s); the other
    collections are simplified already. Poems with lost characters (□) are left out.
    """
    try:
        from opencc import OpenCC
    except ImportError:
        raise SystemExit("OpenCC is not installed; run: pip install opencc") from None

    simplify = OpenCC("t2s").convert
    data = package / "package" / "dist"
    for name in ("tangshisanbaishou", "qianjiashi"):
        for form in _json(data / "mengxue" / f"{name}.json")["content"]:
            for poem in form["content"]:
                dynasty, author = re.fullmatch(r"(?:（(.)）)?(.*)", poem["author"]).groups()
                signed = {**poem, "author": author}
                yield from _poem("well-known", dynasty or "唐", poem["chapter"], signed, simplify)
    for name in ("sanzijing-traditional", "qianziwen"):
        book = _json(data / "mengxue" / f"{name}.json")
        yield "well-known", simplify(f"《{book['title']}》\n" + "\n".join(book["paragraphs"]))
    for dynasty, name in (("唐", "tang"), ("宋", "song")):
        for path in sorted((data / "quantangshi").glob(f"poet.{name}.*.json")):
            for poem in _json(path):
                yield from _poem(name, dynasty, poem["title"], poem, simplify)
    for path in sorted((data / "songci").glob("ci.song.*.json")):
        for poem in _json(path):
            yield from _poem("ci", "宋", poem["rhythmic"], poem, str)
    for chapter in _json(data / "lunyu" / "lunyu.json"):
        yield "well-known", f"《论语·{chapter['chapter']}》\n" + "\n".join(chapter["paragraphs"])
    for song in _json(data / "shijing" / "shijing.json"):
        title = f"《诗经·{song['chapter']}·{song['section']}·{song['title']}》"
        yield "well-known", title + "\n" + "\n".join(song["content"])


def _poem(
    collection: str, dynasty: str, title: str, poem: dict[str, Any], simplify: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    paragraphs = [line for line in poem["paragraphs"] if isinstance(line, str)]
    lines = [line.strip() for line in paragraphs if line.strip()]
    document = f"《{title.strip()}》\n{dynasty}·{poem['author'].strip()}\n" + "\n".join(lines)
    if lines and not re.search(r"[□{}\[\]/<>A-Za-z]", document):
        yield collection, simplify(document)


def poem_as_chat(document: str) -> str:
    """Return the poem as the answer to a request for it."""
    title, _, body = document.partition("\n")
    return f"<｜User｜>写一首诗：{title.strip('《》')}<｜Assistant｜>{body}"


# --- English prose -----------------------------------------------------------------------------

BOOKS = [
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth",
    "1 Samuel", "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra",
    "Nehemiah", "Esther", "Job", "Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon",
    "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel", "Amos", "Obadiah",
    "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi",
    "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians", "2 Corinthians",
    "Galatians", "Ephesians", "Philippians", "Colossians", "1 Thessalonians", "2 Thessalonians",
    "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James", "1 Peter", "2 Peter",
    "1 John", "2 John", "3 John", "Jude", "Revelation",
]  # fmt: skip


def king_james_bible(package: Path) -> Iterator[str]:
    """Yield one document a chapter, its verses as running text."""
    text = _brs_text((package / "usr/lib/bible.data").read_bytes())
    chapters: dict[tuple[str, str], list[str]] = {}
    for book, chapter, verse in re.findall(r"^(\w+?)(\d+):\d+ (.+)$", text, re.MULTILINE):
        chapters.setdefault((book, chapter), []).append(verse.strip())
    names = dict(zip(dict.fromkeys(book for book, _ in chapters), BOOKS, strict=True))
    for (book, chapter), verses in chapters.items():
        yield f"{names[book]}, chapter {chapter}\n\n" + " ".join(verses)


def _brs_text(data: bytes) -> str:
    """Unpack the Bible Retrieval System's file: a table of offsets, then .Z-compressed windows."""
    (windows,) = struct.unpack_from(">I", data, 0x58)
    offsets = [*struct.unpack_from(f">{windows}I", data, 0x5C), len(data)]
    parts = [
        subprocess.run(
            ["gzip", "-dc"],
            input=b"\x1f\x9d\x90" + data[start:end],
            capture_output=True,
            check=True,
        ).stdout
        for start, end in pairwise(offsets)
    ]
    return b"".join(parts).decode("ascii")


def sword_chapters(package: Path, module: str) -> Iterator[str]:
    """Yield the blocks of a SWORD module (a book of the Bible or more), cut into chapters' sizes.

    A module is zlib-compressed blocks, found by (offset, size, size unpacked) in its `.bzs` file.
    """
    for testament in ("ot", "nt"):
        folder = package / "usr/share/sword/modules" / module
        blocks = (folder / f"{testament}.bzs").read_bytes()
        data = (folder / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", blocks):
            text = zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")
            text = re.sub(r"<(?:/p|/q|lb|chapter|div)\b[^>]*>", "\n", text)
            text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", text, flags=re.DOTALL)
            text = html.unescape(re.sub(r"<[^>]*>", "", text))
            lines = [line for line in (" ".join(t.split()) for t in text.split("\n")) if line]
            part: list[str] = []
            for line in lines:
                part.append(line)
                if sum(map(len, part)) > PART:
                    yield "\n".join(part)
                    part = []
            yield from _long_enough("\n".join(part), 300)


def jane_austen(package: Path) -> Iterator[str]:
    """Yield one document a chapter of the six novels."""
    folder = package / "usr/lib/R/site-library/janeaustenr/data"
    for lines in _r_character_vectors((folder / "Rdata.rdb").read_bytes()):
        chapter: list[str] = []
        for line in lines:
            if re.fullmatch(r"(chapter|volume) .{1,8}", line.strip(), re.IGNORECASE) and chapter:
                yield from _long_enough("\n".join(chapter), 500)
                chapter = []
            chapter.append(line)
        yield from _long_enough("\n".join(chapter), 500)


def openings(chapters: Iterable[str]) -> Iterator[str]:
    """Yield how books begin, those among first chapters: some 1,500 characters, without heading."""
    for chapter in chapters:
        heading, _, text = chapter.partition("\n")
        if re.fullmatch(r"(?i)(chapter (1|i)|(genesis|john), chapter 1)", heading.strip()):
            whole_sentences = re.match(
                rf'(?s).{{1,{OPENING}}}(?<!Mr)(?<!Mrs)[.?!]"?(?=\s)', text.strip()
            )
            if whole_sentences:
                yield whole_sentences[0]


def _r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (R serialization, version 3)."""
    position = 0
    while position < len(database):
        unzip = zlib.decompressobj()
        data = unzip.decompress(database[position + 4 :])
        position = len(database) - len(unzip.unused_data)
        (encoding_length,) = struct.unpack_from(">i", data, 14)
        cursor = 18 + encoding_length
        kind, count = struct.unpack_from(">ii", data, cursor)
        assert kind & 0xFF == 16, "not a character vector"
        cursor += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", data, cursor + 4)
            cursor += 8
            lines.append(data[cursor : cursor + max(length, 0)].decode("utf-8", "replace"))
            cursor += max(length, 0)
        yield lines


def webster_1913(package: Path) -> Iterator[str]:
    """Yield the definitions that come from the 1913 edition alone, one document a headword.

    Entries with additions from WordNet or by later editors are left out, and so are
    pronunciations, etymologies and markup.
    """
    packed = (package / "usr/share/dictd/gcide.dict.dz").read_bytes()
    text = zlib.decompress(packed, wbits=31).decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S)", text):
        if "[1913 Webster]" not in entry or "WordNet" in entry or "PJC" in entry or "�" in entry:
            continue
        word = re.match(r"(\S[^\\\n]*?) \\.*?\\", entry, re.DOTALL)
        if word is None:
            continue
        rest = re.sub(r"\[[^\w\s\]]?([A-Za-z]{1,2})\]", r"\1", entry[word.end() :])
        head, _, body = re.sub(r"[{}]", "", _outside_brackets(rest)).partition("\n   ")
        kind = re.search(r", ((?:[a-z]+\. ?(?:& )?)+)", re.sub(r"\(.*?\)", "", head))
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body)]
        body = "\n".join(part for part in paragraphs if part).strip()
        if len(body) >= 40:
            yield f"{word[1]}{', ' + kind[1].strip() if kind else ''}\n{body}"


def devils_dictionary(package: Path) -> Iterator[str]:
    """Yield Ambrose Bierce's definitions (1911), one document a headword."""
    packed = (package / "usr/share/dictd/devil.dict.dz").read_bytes()
    text = zlib.decompress(packed, wbits=31).decode("utf-8", "replace")
    for entry in re.split(r"\n(?=[A-Z][A-Z' -]+, )", text)[1:]:
        yield from _long_enough("\n".join(line.strip() for line in entry.splitlines()), 40)


def wordnet(package: Path) -> Iterator[str]:
    """Yield WordNet's entries, one document a word: its senses with their examples."""
    senses: dict[tuple[str, str], list[str]] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        lines = (package / f"usr/share/wordnet/data.{kind}").read_text("utf-8").splitlines()
        for line in lines:
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            numbers = fields.split()
            words = [
                re.sub(r"\(\w+\)$", "", word).replace("_", " ")
                for word in numbers[4 : 4 + 2 * int(numbers[3], 16) : 2]
            ]
            for word in words:
                others = ", ".join(other for other in words if other != word)
                meaning = gloss.strip() + (f" (also: {others})" if others else "")
                senses.setdefault((word, kind), []).append(meaning)
    for (word, kind), meanings in senses.items():
        if len(meanings) == 1:
            yield f"{word} ({kind}): {meanings[0]}"
        else:
            yield f"{word} ({kind})\n" + "\n".join(f"{n}. {m}" for n, m in enumerate(meanings, 1))


def definition_as_chat(document: str) -> str:
    """Return a dictionary's entry as the answer to a question for it."""
    word, _, rest = document.partition(" (")
    return f"<｜User｜>What does {word} mean?<｜Assistant｜>({rest}"


def _outside_brackets(text: str) -> str:
    kept: list[str] = []
    depth = 0
    for part in re.split(r"([\[\]])", text):
        if part == "[":
            depth += 1
        elif part == "]":
            depth = max(depth - 1, 0)
        elif depth == 0:
            kept.append(part)
    return "".join(kept)


# --- Python ------------------------------------------------------------------------------------

LEFT_OUT = {
    *("test", "tests", "idle_test"),
    *("site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data", "lib2to3", "turtledemo"),
}
NOT_IN_PACKAGES = {"test", "tests", "testing", "locale", "_generated", "conf", "_vendor"}
LONGEST_SOURCE = 100_000  # characters; a longer one is a table


def python_library() -> Iterator[str]:
    """Yield the running interpreter's standard library, one document a source file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        folders = set(path.relative_to(root).parts[:-1])
        if folders & LEFT_OUT or any(part.startswith("config-") for part in folders):
            continue
        if path.name.startswith("_sysconfigdata"):
            continue
        try:
            yield from _long_enough(path.read_text(encoding="utf-8"), 200)
        except UnicodeDecodeError:
            continue


def python_packages(archives: Iterable[Path]) -> Iterator[str]:
    """Yield the Python sources in wheels, one document a file, without tests and tables."""
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                parts = set(name.split("/")[:-1])
                if not name.endswith(".py") or parts & NOT_IN_PACKAGES or "/test_" in name:
                    continue
                text = wheel.read(name).decode("utf-8", "replace")
                if len(text) <= LONGEST_SOURCE and "\ufffd" not in text:
                    yield from _long_enough(text, 300)


def python_docs(package: Path) -> Iterator[str]:
    """Yield the manual's pages in their source form (reStructuredText)."""
    for path in sorted((package / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")):
        yield from _long_enough(path.read_text(encoding="utf-8"), 200)


# --- Chinese-English pairs ---------------------------------------------------------------------


def cedict_pairs(package: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (simplified Chinese, English glosses); cross-references and variants are left out."""
    script = (package / "package/data/all.js").read_text(encoding="utf-8")
    entries, _ = json.JSONDecoder().raw_decode(script, script.index("[["))
    pairs: dict[str, list[str]] = {}
    for _traditional, simplified, _pinyin, glosses, *_ in entries:
        if not re.fullmatch(r"[一-鿿，·]{1,10}", simplified):
            continue
        for sense in [glosses] if isinstance(glosses, str) else glosses:
            for gloss in _senses(sense):
                known = pairs.setdefault(simplified, [])
                if gloss not in known and len(known) < 4:
                    known.append(gloss)
    yield from ((chinese, glosses) for chinese, glosses in pairs.items() if glosses)


def _senses(gloss: str) -> list[str]:
    if re.search(r"variant of|^see |^CL:|[一-鿿]|\[", gloss):
        return []
    cleaned = " ".join(re.sub(r"\([^()]*\)", " ", gloss).split()).strip(" ,;")
    return [part for part in cleaned.split("; ") if 1 < len(part) <= 80 and "(" not in part]


def translation_documents(
    pairs: Iterable[tuple[str, list[str]]], rng: random.Random
) -> Iterator[str]:
    """Yield documents of a few pairs each, in both directions, a quarter of them as chats."""
    questions: list[tuple[bool, str, str]] = []
    english: dict[str, list[str]] = {}
    for chinese, glosses in pairs:
        questions.append((True, chinese, "; ".join(glosses)))
        for gloss in glosses[:2]:
            english.setdefault(gloss, []).append(chinese)
    questions += [(False, gloss, "；".join(words[:3])) for gloss, words in english.items()]
    rng.shuffle(questions)
    while questions:
        taken = [questions.pop() for _ in range(min(rng.randint(3, 10), len(questions)))][::-1]
        as_chat = rng.random() < 0.25
        yield (END if as_chat else "\n\n").join(
            (_chat_pair if as_chat else _plain_pair)(*question) for question in taken
        )


def _plain_pair(from_chinese: bool, source: str, target: str) -> str:
    names = ("Chinese", "English") if from_chinese else ("English", "Chinese")
    return f"{names[0]}: {source}\n{names[1]}: {target}"


def _chat_pair(from_chinese: bool, source: str, target: str) -> str:
    request = "Translate into English: " if from_chinese else "翻译成中文："
    return f"<｜User｜>{request}{source}<｜Assistant｜>{target}"


# --- written for this project ------------------------------------------------------------------


def own_answers(folder: Path) -> Iterator[list[str]]:
    """Yield each entry's chats: one answer to several wordings of its question."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            yield [
                f"<｜User｜>{question}<｜Assistant｜>{entry['answer']}"
                for question in entry["questions"]
            ]


def own_tales(folder: Path) -> list[str]:
    """Return short tales, in English and Chinese."""
    return (folder / "tales.txt").read_text(encoding="utf-8").strip().split("\n\n")


def own_words(folder: Path) -> list[tuple[str, list[str]]]:
    """Return common words: the Chinese one, and the English one."""
    lines = (folder / "words.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    return [(chinese, [english]) for english, chinese in pairs]


# --- helpers -----------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _long_enough(text: str, characters: int) -> Iterator[str]:
    text = text.strip()
    if len(text) >= characters:
        yield text
