import re
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moescope.api import Model
from moescope.engine.sequence import Token
from moescope.engine.thinking import BEGIN, END, ThoughtSplitter


def split(model: Model, prompt: str, tokens: list[tuple[int, str]]) -> tuple[str, str, int]:
    splitter = ThoughtSplitter(model.tokenizer, model.tokenizer.encode(prompt))
    thought, answer = "", ""
    for at, (token_id, text) in enumerate(tokens):
        last = at == len(tokens) - 1
        more = splitter.feed(Token(0, token_id, text, 0.0, "stop" if last else None))
        thought, answer = thought + more[0], answer + more[1]
    return thought, answer, splitter.thought_tokens


PIECES = st.sampled_from(
    [BEGIN, END, " ", "\n", "a", "月", "<", "<t", "think>", "</", "think", ">", "\n\n"]
)


@given(st.lists(PIECES, min_size=1, max_size=12), st.booleans())
def test_a_thought_written_in_any_pieces_is_what_a_pattern_finds(
    model: Model, pieces: list[str], begun: bool
) -> None:
    thought, answer, _ = split(model, f"x{BEGIN}\n" if begun else "x", [(65, p) for p in pieces])
    text = "".join(pieces)
    if not begun and not text.lstrip().startswith(BEGIN):
        assert (thought, answer) == ("", text)
        return
    inside = text if begun else re.sub(rf"^\s*{BEGIN}", "", text)
    expected = inside.split(END, 1)
    assert [thought, answer] == [*expected, ""][:2]


def test_marks_that_the_text_leaves_out_count_all_the_same(model: Model) -> None:
    begin, end = (model.tokenizer.token_id(tag) for tag in (BEGIN, END))
    assert begin is not None and end is not None
    tokens: list[Any] = [(begin, ""), (65, "ti"), (end, "<"), (66, "is")]
    assert split(model, "x", tokens) == ("ti<", "is", 3)


def test_marks_in_an_answer_stay_left_out(model: Model) -> None:
    begin, end = (model.tokenizer.token_id(tag) for tag in (BEGIN, END))
    assert begin is not None and end is not None
    assert split(model, "x", [(65, "a"), (end, ""), (begin, ""), (65, "b")]) == ("", "ab", 0)
    assert split(model, "x", [(end, ""), (65, "a")]) == ("", "a", 0)


def test_blanks_and_pieces_before_a_thought_count_with_it(model: Model) -> None:
    pieces = [(65, "\n"), (65, "<thi"), (65, "nk>"), (65, "a"), (65, "</think>b")]
    assert split(model, "x", pieces) == ("a", "b", 5)


def test_a_thought_that_nobody_ends_is_all_there_is(model: Model) -> None:
    assert split(model, f"x{BEGIN}", [(65, "a"), (65, "</thi")]) == ("a</thi", "", 2)


def test_a_vocabulary_without_marks_tells_all(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "token_id", lambda _: None)
    assert split(model, "x", [(65, "a"), (65, "b")]) == ("", "ab", 0)
