"""A model without a tokenizer computes, and says what it lacks where text is asked for."""

from pathlib import Path

import gguf_models
import pytest
import torch

import moescope
from moescope.api import Model
from moescope.cli.main import run
from moescope.errors import UserError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    model.save(tmp_path)
    for file in tmp_path.glob("tokenizer*.json"):
        file.unlink()
    return tmp_path


def test_a_folder_without_one_computes_steers_and_is_saved(model: Model, folder: Path) -> None:
    opened = moescope.load(folder)
    torch.testing.assert_close(opened.logits(IDS), model.logits(IDS))
    steered = opened.steer(num_experts_per_tok=1)
    assert not torch.equal(steered.logits(IDS), opened.logits(IDS))
    opened.save(folder / "again")
    assert torch.equal(moescope.load(folder / "again").logits(IDS), opened.logits(IDS))
    assert not list((folder / "again").glob("tokenizer*"))


def test_what_needs_text_says_so(folder: Path) -> None:
    opened = moescope.load(folder)
    for ask in (
        lambda: opened.tokenizer,
        lambda: opened.generate("a"),
        lambda: list(opened.stream([1, 2])),
        lambda: opened.trace("a"),
        lambda: opened.engine.encode_chat([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(UserError, match=r"no tokenizer.*put its tokenizer.json beside"):
            ask()


def test_the_command_line_plans_it_and_refuses_the_rest_in_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(folder), "--json"]) == 0
    capsys.readouterr()
    for command in (
        ["generate", "a", "--model", str(folder)],
        ["chat", "a", "--model", str(folder)],
        ["explain", "a", "--model", str(folder)],
        ["serve", str(folder)],
        ["open", str(folder), "--no-browser"],
    ):
        assert run(command) == 2
        said = capsys.readouterr()
        assert said.out == "" and "no tokenizer" in said.err and said.err.count("\n") == 1


def test_a_gguf_file_without_one_computes(tmp_path: Path) -> None:
    made = gguf_models.network(gguf_models.V2)
    whole = gguf_models.write(made, tmp_path / "whole.gguf")
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(whole.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.lacks"))
    opened = moescope.load(bare, dtype="float32")
    assert torch.equal(opened.logits(IDS), moescope.load(whole, dtype="float32").logits(IDS))
    with pytest.raises(UserError, match="no tokenizer"):
        opened.generate("a")
