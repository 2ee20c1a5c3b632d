from hypothesis import given, strategies as st

from moescope.engine.stopping import StopFinder

LETTERS = st.text("ab月", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab月", min_size=1, max_size=3), max_size=3))
def test_what_is_let_through_is_the_text_before_the_first_stop(
    pieces: list[str], stop: list[str]
) -> None:
    finder, text = StopFinder(stop), "".join(pieces)
    out = "".join(finder.feed(piece) for piece in pieces) + finder.feed("", final=True)
    assert (finder.found is not None) == any(s in text for s in stop)
    assert text.startswith(out)
    assert not any(s in out for s in stop)
    if finder.found is None:
        assert out == text
    else:
        assert any(text.startswith(s, len(out)) for s in stop)


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    finder = StopFinder(["END"])
    assert finder.feed("go E") == "go "
    assert finder.feed("N") == ""
    assert finder.feed("T") == "ENT"
