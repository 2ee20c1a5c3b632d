"""Which documents are read, and how they are cut."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.errors import UserError
from moescope.scope.texts import BYTES_PER_PASSAGE, batches, labelled_documents, passages, windows


def write(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def test_domains_are_sorted_and_have_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.jsonl", *(f"{n:03} 月光" for n in range(50)))
    write(tmp_path / "a" / "x.jsonl", "short")
    documents = labelled_documents(tmp_path, 65)
    assert [document.domain for document in documents] == ["a", *["b"] * (len(documents) - 1)]
    sizes = [len(d.text.encode()) for d in documents if d.domain == "b"]
    assert sizes[:-1] == [10] * 6
    assert sum(sizes) in (63, 64, 65)  # the last document is cut, between two characters
    assert documents[0].text == "short"


def test_the_choice_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(100)]
    write(tmp_path / "one" / "d" / "x.jsonl", *texts)
    write(tmp_path / "two" / "d" / "x.jsonl", *reversed(texts))
    chosen = labelled_documents(tmp_path / "one", 200)
    assert chosen == labelled_documents(tmp_path / "two", 200)
    assert 18 <= len(chosen) <= 23
    assert [d.text for d in chosen] != texts[: len(chosen)]


def test_of_a_split_source_the_held_out_part_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train" / "d" / "x.jsonl", "seen")
    write(tmp_path / "held_out" / "d" / "x.jsonl", "unseen")
    assert [document.text for document in labelled_documents(tmp_path)] == ["unseen"]


def test_empty_text_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "d" / "x.jsonl", "")
    with pytest.raises(UserError, match="only empty documents"):
        labelled_documents(tmp_path)


@given(st.lists(st.tuples(st.sampled_from(["a", "月", "月光\n", "\n"]), st.integers(0, 5000))))
def test_passages_are_short_and_join_to_the_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(piece * times for piece, times in runs)
    cut = list(passages(text))
    assert "".join(cut) == text
    assert all(0 < len(passage.encode()) <= BYTES_PER_PASSAGE for passage in cut)
    for passage in cut[:-1]:
        assert passage.endswith("\n") or "\n" not in passage


@pytest.mark.parametrize("overlap", [0, 1])
def test_every_token_stands_in_one_window(overlap: int) -> None:
    """With an overlap of one, every token but a document's first is predicted in one window."""
    encoded = [list(range(n)) for n in (1, 2, 7, 8, 9, 16)]
    seen: list[tuple[int, int]] = []
    for batch, ids in batches(encoded, windows(encoded, 8, overlap)):
        for window, row in zip(batch, ids.tolist(), strict=True):
            own = row[: window.end - window.start]
            assert own == encoded[window.document][window.start : window.end]
            assert len(own) <= 8 + overlap
            seen += [(window.document, token) for token in own[overlap:]]
    expected = [(n, token) for n, ids in enumerate(encoded) for token in ids[overlap:]]
    assert sorted(seen) == expected
