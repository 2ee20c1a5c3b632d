"""What to call an expert: by what the tokens that come to it have in common.

Experts are small networks, and most of what they divide among themselves is patterns of text. So a
name tells the kind of most of an expert's typical tokens, and an expert whose tokens have nothing
in common has none: it goes by the tokens themselves.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moescope.scope.specialization import Specialization

TOKENS = 4
"""Typical tokens on a card."""
ENOUGH = 0.55
"""Share of an expert's typical tokens, by rank, that have to be of a kind for its name."""

BIBLE = "unto thee thou thy shall ye hath saith Lord Israel behold whom"
LINKS = "of to in by with from for at and or that which as into upon on"
PRONOUNS = "I he she they we you it them me him her who one us his their"
SEASONS = set("山水云月风花雨雪春秋天日江柳香烟树红飞青黄龙草木星河松竹梅柏霜露夜晓")
FUNCTION = set("不无有自为如之已在中处来去欲莫此却应未尽更相难多谁")
NUMERALS = set("一二三四五六七八九十百千万")
MENUS = set("件选择格式用单个「」页表列框钮档文字数录指")
HELPERS = "is are be was were been am will would have has had can may do does did not"
SOFTWARE = "file files data text document dialog value number system table current select use"


@dataclass(frozen=True)
class Card:
    """One expert.

    Attributes:
        zh, en: its name in both languages; None where its tokens are of no one kind.
        tokens: the most typical ones.
        domain: position of the domain that takes most of its work; every domain counts alike.
        domain_share: what of its work that takes.
    """

    zh: str | None
    en: str | None
    tokens: list[str]
    domain: int
    domain_share: float


@dataclass(frozen=True)
class Kind:
    """A kind of token, and what an expert of such tokens is called."""

    zh: str
    en: str
    is_one: Callable[[str], bool]


def _words(words: str) -> Callable[[str], bool]:
    known = frozenset(word.lower() for word in words.split())
    return lambda token: token.strip().lower() in known


def _pattern(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda token: compiled.fullmatch(token) is not None


def _all_of(characters: set[str]) -> Callable[[str], bool]:
    return lambda token: bool(token) and set(token) <= characters


KINDS = (
    Kind("数字", "digits", _pattern(r" ?\d+")),
    Kind("运算符号", "plus and minus", _pattern(r"\s*[-+*/×÷=<>()]{1,2}")),
    Kind("进位借位", "carry and borrow", _words("carry borrow write negative")),
    Kind("缩进", "indentation", _pattern(r"\s{2,}|\n")),
    Kind(
        "Python",
        "Python",
        _words(
            "self def return None path name file object function string func if elif else import "
            "Python class `` ` # _ __ ._ True False args"
        ),
    ),
    Kind("软件词汇", "software words", _words(SOFTWARE)),
    Kind("圣经腔", "Bible voice", _words(BIBLE)),
    Kind("诗题《》", "poem titles", _pattern(r"[《》]\n?|宋|唐|·|其[一二三四]|诗|题|李")),
    Kind("诗句停顿", "ends of verses", _pattern(r"[，。、？；]\n?")),
    Kind("风花雪月", "nature words", _all_of(SEASONS)),
    Kind("诗中虚词", "verse particles", _all_of(FUNCTION)),
    Kind("中文数词", "Chinese numerals", _all_of(NUMERALS)),
    Kind("界面用字", "words of menus", _all_of(MENUS)),
    Kind(
        "翻译题头",
        "translation headings",
        _words("English Chinese Translate translation 翻译成中文 ： : into to"),
    ),
    Kind("介词连词", "small link words", _words(LINKS)),
    Kind("助动词", "helping verbs", _words(HELPERS)),
    Kind("大写字母", "capital letters", _pattern(r" ?[A-Z]")),
    Kind("人称代词", "pronouns", _words(PRONOUNS)),
    Kind(
        "英文词尾",
        "word endings",
        _pattern(r"(?:ed|ing|ic|al|ation|er|ate|ly|y|ge|tic|ous|ian|an|es|th|ti|ism|it|rst|s)"),
    ),
    Kind("标点", "punctuation", _pattern(r" ?[.,;:!?\"'’“”)(-]+\n*")),
    Kind("汉字", "Chinese characters", _pattern(r"[\u4e00-\u9fff]+")),
)
"""The more particular ones first."""


def cards_of(found: Specialization) -> list[list[Card]]:
    """Return a card for each expert, `[layer position][expert]`.

    Of several experts of one kind in a layer, the one with most of it has the name; the others go
    by their tokens.
    """
    return [_layer_cards(found, at) for at in range(len(found.layers))]


def _layer_cards(found: Specialization, at: int) -> list[Card]:
    typical = [[token.text for token in tokens] for tokens in found.typical[at]]
    best: dict[Kind, int] = {}  # its expert
    for kind in KINDS:
        shares = [_share(kind, tokens) for tokens in typical]
        free = [e for e in range(len(shares)) if e not in best.values() and shares[e] > ENOUGH]
        if free:
            best[kind] = max(free, key=lambda expert: shares[expert])
    named = {expert: kind for kind, expert in best.items()}
    cards: list[Card] = []
    for expert, tokens in enumerate(typical):
        loads = [load[at][expert] for load in found.load]
        most = max(range(len(loads)), key=lambda domain: loads[domain])
        kind = named.get(expert)
        cards.append(
            Card(
                zh=kind.zh if kind else None,
                en=kind.en if kind else None,
                tokens=tokens[:TOKENS],
                domain=most,
                domain_share=loads[most] / (sum(loads) or 1.0),
            )
        )
    return cards


def _share(kind: Kind, tokens: Sequence[str]) -> float:
    """What of an expert's typical tokens is of a kind; the first count most."""
    weights = [1 / (rank + 2) for rank in range(len(tokens))]
    mine = sum(w for w, token in zip(weights, tokens, strict=True) if kind.is_one(token))
    return mine / sum(weights) if weights else 0.0
