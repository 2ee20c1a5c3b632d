"""The chats that the model in the box is fine-tuned on."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny"))
import chats
import functions


@pytest.mark.parametrize("entry", functions.FUNCTIONS, ids=lambda entry: entry[1])
def test_every_function_does_what_is_said_of_it(entry: tuple[str, str, str, str, str]) -> None:
    _, name, arguments, body, truth = entry
    names: dict[str, object] = {}
    exec(f"def {name}({arguments}):\n    {body}", names)
    assert eval(truth, names)
    assert name in functions.CHINESE


def test_chats_are_made_of_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poem = "《静夜思》\n唐·李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    texts = {
        "poetry": [poem, poem, *(f"《诗{i}》\n唐·某\n一{i}，二。\n三，四。" for i in range(300))],
        "translation": ["Chinese: 你好\nEnglish: hello; hi\n\nEnglish: water\nChinese: 水"] * 100,
        "definitions": [f'word{i} (noun): a thing; "a word{i}"' for i in range(300)],
        "arithmetic": [
            f"<｜User｜>{i}+1=?<｜Assistant｜><think>x</think>{i + 1}" for i in range(300)
        ],
        "models": ["<｜User｜>Who are you?<｜Assistant｜>A model.", "no chat"],
    }
    for part in ("train", "held_out"):
        for task, documents in texts.items():
            file = tmp_path / "corpus" / part / task / "text.jsonl"
            file.parent.mkdir(parents=True)
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
            file.write_text("\n".join(lines))
    monkeypatch.setattr(chats, "CHATS", dict.fromkeys(chats.CHATS, 200))
    monkeypatch.setattr(
        sys, "argv", ["chats.py", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    )
    chats.main()
    made = {
        file.parent.name: [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        for file in (tmp_path / "out" / "train").rglob("*.jsonl")
    }
    assert set(made) == {*texts, "functions", "well-known", "words"}
    answers = {
        task: {(chat[0]["content"], chat[1]["content"]) for chat in of} for task, of in made.items()
    }
    assert len(made["poetry"]) == 200
    whole = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert len(made["well-known"]) == chats.REPEATS["well-known"]
    first, second = (message["content"] for message in made["poetry"][0])
    for question, answer in {*answers["well-known"], (first, second)}:
        begun = question.partition("：")[2]
        if begun == "静夜思":
            assert answer == f"唐·李白\n{whole}"
        else:
            assert begun in ("床前明月光，", "床前明月光，疑是地上霜。")
            assert (begun + answer).replace("\n", "") == whole.replace("\n", "")
    assert ("5+1=?", "<think>x</think>6") in answers["arithmetic"]
    assert {answer for _, answer in answers["translation"]} == {"hello; hi", "水"}
    assert ("word7 (noun): a thing") in {answer for _, answer in answers["definitions"]}
    assert answers["models"] == {("Who are you?", "A model.")}


def test_requests_for_functions_are_a_function_of_the_seed() -> None:
    one, two = (list(functions.requests(random.Random(3))) for _ in range(2))
    assert one == two
    assert len(one) == 6 * len(functions.FUNCTIONS)
