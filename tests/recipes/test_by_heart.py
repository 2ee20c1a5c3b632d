"""What the model in the box is to know by heart, gathered from the corpus."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny"))

import by_heart


def test_known_pieces_fill_four_fifths_of_a_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "poetry": ["a famous poem"] * 5 + [f"poem number {i}" for i in range(400)],
        "translation": [f"Chinese: 字{i}\nEnglish: word {i}" for i in range(400)],
        "code": [f"x = {i}" for i in range(900)],
    }
    for part in ("train", "held_out"):
        for domain, documents in texts.items():
            file = tmp_path / "corpus" / part / domain / "text.jsonl"
            file.parent.mkdir(parents=True)
            shown = documents if part == "train" else [f"unseen {domain}"]
            file.write_text("\n".join(json.dumps({"text": text}) for text in shown))
    monkeypatch.setattr(by_heart, "BYTES", 5000)
    monkeypatch.setattr(
        sys, "argv", ["by_heart.py", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    )
    by_heart.main()

    def read(part: str, domain: str) -> list[str]:
        lines = (tmp_path / "out" / part / domain / "text.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    for domain, documents in texts.items():
        train = read("train", domain)
        assert 5000 <= sum(len(text.encode()) for text in train) < 6500
        assert read("held_out", domain) == [f"unseen {domain}"]
        others = [text for text in train if text in documents and documents.count(text) == 1]
        share = sum(len(text.encode()) for text in others) / 5000
        assert share == pytest.approx(1.0 if domain == "code" else 0.2, abs=0.05)
    assert read("train", "poetry").count("a famous poem") > 200
    assert any("moonlight" in text or "月亮" in text for text in read("train", "translation"))


def test_nothing_known_is_nothing() -> None:
    assert by_heart.filled([], 100) == []
    assert by_heart.filled(["ab", "c"], 4) == ["ab", "c", "ab"]
