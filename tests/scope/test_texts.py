"""Which documents are read, and how they are cut."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moescope.errors import UserError
from moescope.scope.texts import BYTES_PER_PASSAGE, batches, labelled_text, passages, windows
from moescope.text.split import FILE, Fingerprint, TrainedDomain, TrainedText, hash_number


def write(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def test_domains_are_sorted_and_have_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.jsonl", *(f"{n:03} 月光" for n in range(50)))
    write(tmp_path / "a" / "x.jsonl", "short")
    documents = labelled_text(tmp_path, 65).documents
    assert [document.domain for document in documents] == ["a", *["b"] * (len(documents) - 1)]
    sizes = [len(d.text.encode()) for d in documents if d.domain == "b"]
    assert sizes[:-1] == [10] * 6
    assert sum(sizes) in (63, 64, 65)  # the last document is cut, between two characters
    assert documents[0].text == "short"


def test_the_choice_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(100)]
    write(tmp_path / "one" / "d" / "x.jsonl", *texts)
    write(tmp_path / "two" / "d" / "x.jsonl", *reversed(texts))
    chosen = labelled_text(tmp_path / "one", 200).documents
    assert chosen == labelled_text(tmp_path / "two", 200).documents
    assert 18 <= len(chosen) <= 23
    assert [d.text for d in chosen] != texts[: len(chosen)]


def test_of_a_split_source_the_held_out_part_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train" / "d" / "x.jsonl", "seen")
    write(tmp_path / "held_out" / "d" / "x.jsonl", "unseen")
    assert [document.text for document in labelled_text(tmp_path).documents] == ["unseen"]


def test_empty_text_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "d" / "x.jsonl", "")
    with pytest.raises(UserError, match="only empty documents"):
        labelled_text(tmp_path)


# --- what was trained on -------------------------------------------------------------------------


def remember(trained: dict[str, list[str]], held_out: dict[str, list[str]], below: int | None):
    """What a training remembers of its text."""

    def fingerprint(texts: list[str]) -> Fingerprint:
        return Fingerprint(len(texts), sum(map(hash_number, texts)) % 2**64)

    return TrainedText(
        {
            domain: TrainedDomain(fingerprint(texts), fingerprint(held_out.get(domain, [])), below)
            for domain, texts in trained.items()
        }
    )


@pytest.fixture
def unsplit(tmp_path: Path) -> tuple[Path, TrainedText, dict[str, set[str]]]:
    """Text in which documents are held out by hash, in which `lone` has a single document."""
    below = 2**62
    texts = {
        "poems": [f"第{n}首：床前明月光" for n in range(40)],
        "sums": [f"{n} + 1 = {n + 1}" for n in range(40)],
        "lone": ["a book of one piece"],
    }
    parts: list[dict[str, list[str]]] = [{}, {}]
    for domain, lines in texts.items():
        write(tmp_path / "text" / domain / "x.jsonl", *lines)
        for text in lines:
            kept = domain != "lone" and hash_number(text) < below
            parts[kept].setdefault(domain, []).append(text)
    held_out = {domain: set(lines) for domain, lines in parts[1].items()}
    assert all(5 < len(lines) < 20 for lines in held_out.values())
    limits = {"poems": below, "sums": below, "lone": hash_number(texts["lone"][0])}
    remembered = remember(parts[0], parts[1], None)
    domains = {
        domain: replace(told, held_out_below=limits[domain])
        for domain, told in remembered.domains.items()
    }
    return tmp_path / "text", TrainedText(domains), held_out


def test_of_text_that_was_trained_on_only_the_held_out_documents_are_read(unsplit) -> None:
    source, remembered, held_out = unsplit
    found = labelled_text(source, trained=[remembered])
    read: dict[str, set[str]] = {}
    for document in found.documents:
        read.setdefault(document.domain, set()).add(document.text)
    assert read == held_out
    assert found.held_out == {"poems": True, "sums": True}
    assert found.left_out == ["lone"]
    assert found.notes() == ["left out, as all of it was trained on: lone"]


def test_domains_are_known_again_by_their_documents_not_by_their_names(
    unsplit, tmp_path: Path
) -> None:
    source, remembered, held_out = unsplit
    (source / "poems").rename(source / "verses")
    found = labelled_text(source / "verses" / "x.jsonl", trained=[remembered])
    assert {document.text for document in found.documents} == held_out["poems"]
    assert found.held_out == {"default": True}


def test_where_one_model_knows_nothing_of_the_text_it_is_said(unsplit) -> None:
    source, remembered, held_out = unsplit
    found = labelled_text(source, trained=[remembered, None])
    assert {d.text for d in found.documents if d.domain == "sums"} == held_out["sums"]
    assert found.held_out == {"poems": False, "sums": False}
    assert found.notes()[0].startswith("nothing tells whether this text")
    write(source / "sums" / "more.jsonl", "one document more")
    changed = labelled_text(source, trained=[remembered])
    assert changed.held_out == {"poems": True, "sums": False}
    assert len([d for d in changed.documents if d.domain == "sums"]) == 41


def test_a_split_made_by_folders_is_known_again_and_its_training_part_refused(
    tmp_path: Path,
) -> None:
    write(tmp_path / "train" / "d" / "x.jsonl", "seen", "seen too")
    write(tmp_path / "held_out" / "d" / "x.jsonl", "unseen")
    remembered = remember({"d": ["seen", "seen too"]}, {"d": ["unseen"]}, None)
    for source in (tmp_path, tmp_path / "held_out"):
        found = labelled_text(source, trained=[remembered])
        assert [document.text for document in found.documents] == ["unseen"]
        assert found.held_out == {"d": True}
    with pytest.raises(UserError, match="was trained on; give text that was not"):
        labelled_text(tmp_path / "train", trained=[remembered])


def test_what_is_remembered_is_read_back(unsplit, tmp_path: Path) -> None:
    _, remembered, _ = unsplit
    assert TrainedText.load(tmp_path) is None
    assert TrainedText.load(tmp_path / "model.gguf") is None
    remembered.save(tmp_path)
    assert TrainedText.load(tmp_path) == remembered
    (tmp_path / FILE).write_text('{"domains": {"d": 3}}')
    with pytest.raises(UserError, match=r"trained_text.json is damaged"):
        TrainedText.load(tmp_path)


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
