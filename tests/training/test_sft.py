"""Fine-tuning on chats: what is learned, what is not, and that a stopped training goes on."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import rows, write_config

from moescope.checkpoint import load_model, save_weights
from moescope.cli import main as cli
from moescope.errors import UserError
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.text.tokenizer import Tokenizer
from moescope.training.sft import ChatPart, answer_loss, encode_chat, padded, read_chats

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<Q>{{ m['content'] }}"
    "{% else %}<A>{{ m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.fixture
def talker(tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    """A tokenizer with a chat form that leaves the thoughts of earlier answers out."""
    folder = tmp_path / "talker"
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return Tokenizer.load(folder)


@pytest.fixture
def start(talker: Tokenizer, tmp_path: Path) -> Path:
    """A small model's folder, with that tokenizer."""
    config = read_config(small_model(), "small")
    model = CausalLM(config)
    initialise(model, 0)
    folder = tmp_path / "start"
    save_weights(model, folder)
    talker.save(folder)
    return folder


def small_model() -> dict[str, object]:
    from small import TABLES

    return {
        **TABLES["model"],
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "trained_length": 48,
    }


def chat(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if at % 2 else "user", "content": text}
        for at, text in enumerate(texts)
    ]


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))


def test_only_answers_and_their_end_are_learned(talker: Tokenizer) -> None:
    (made,) = encode_chat(chat("how?", "so.", "why?", "thus."), talker)
    learned = [i for i, answered in zip(made.ids, made.answered, strict=True) if answered]
    spelled = talker.decode(learned, skip_special_tokens=False)
    eos = talker.decode([1], skip_special_tokens=False)
    assert spelled == f"so.{eos}thus.{eos}"
    whole = talker.apply_chat_template(chat("how?", "so.", "why?", "thus."), False)
    assert talker.decode(made.ids, skip_special_tokens=False) == whole


def test_a_thought_is_learned_and_an_earlier_one_is_not_met_again(talker: Tokenizer) -> None:
    first, second = encode_chat(chat("a", "<think>t</think>b", "c", "<think>u</think>d"), talker)
    assert "<think>t</think>b" in talker.decode(first.ids, skip_special_tokens=False)
    text = talker.decode(second.ids, skip_special_tokens=False)
    assert "<think>t" not in text
    assert text.endswith("<A><think>u</think>d" + talker.decode([1], skip_special_tokens=False))
    assert "b" in text


def test_the_loss_is_the_mean_over_answers_tokens(talker: Tokenizer) -> None:
    torch.manual_seed(0)
    model = CausalLM(read_config(small_model(), "small")).eval()
    initialise(model, 1)
    texts = [("a", "bcd"), ("why?", "e"), ("what is it?", "fgh ijk")]
    chats = [encode_chat(chat(*pair), talker)[0] for pair in texts]
    ids, read, scored = padded(chats, 2)
    part = ChatPart(ids=ids, share=1.0, read=read, scored=scored)
    found = answer_loss(model, model(ids[:, :-1]), part)
    wanted: list[torch.Tensor] = []
    for one in chats:  # each by itself: nothing of another chat, and nothing that fills up
        alone = torch.tensor([one.ids])
        logits = model.logits(model(alone[:, :-1]))[0].double()
        losses = F.cross_entropy(logits, alone[0, 1:], reduction="none")
        wanted.append(losses[torch.tensor(one.answered)[1:]])
    torch.testing.assert_close(found.double(), torch.cat(wanted).mean(), rtol=1e-5, atol=1e-6)


def test_a_killed_training_goes_on_bit_for_bit(start: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats"
    pairs = [chat(f"{n}?", f"{n} {n}.") for n in range(30)]
    write_chats(data / "train" / "echo" / "a.jsonl", pairs[:24])
    write_chats(data / "held_out" / "echo" / "a.jsonl", pairs[24:])
    config = write_config(tmp_path / "c.toml", training={"dtype": "float32", "steps": 8})
    text = config.read_text()
    config.write_text('kind = "sft"\n' + text[text.index("[data]") :])

    def run(out: Path, *more: str) -> None:
        arguments = ["train", str(config), "--data", str(data), "--start-from", str(start)]
        assert cli.run([*arguments, "--out", str(out), *more]) == 0

    run(tmp_path / "whole", "--checkpoint-every", "3")
    run(tmp_path / "again", "--checkpoint-every", "3")
    run(tmp_path / "again", "--from-step", "6")
    assert rows(tmp_path / "whole") == rows(tmp_path / "again")
    ours, theirs = (load_model(tmp_path / name).state_dict() for name in ("whole", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_model(tmp_path / "whole").config.trained_length == 48
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.3


def test_what_is_no_chat_is_named(talker: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 1 is no chat record"):
        read_chats(tmp_path / "bad.jsonl", talker, 64)


def test_a_kind_that_goes_on_from_a_model_wants_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.toml")
    config.write_text('kind = "sft"\n' + config.read_text())
    assert cli.run(["train", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "--start-from" in capsys.readouterr().err
