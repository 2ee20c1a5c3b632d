"""The verb: any model in, a GGUF file or a folder out, and what becomes of mistakes."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import V2, logits_of_llama_cpp, network, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import moescope
from moescope.catalog import BOX
from moescope.cli.main import run
from moescope.formats.gguf.file_types import FILE_TYPES, tensor_type
from moescope.kernels import cpu

needs_extension = pytest.mark.skipif(not cpu.available(), reason="the extension is not built")
IDS = torch.randint(0, 320, (1, 60), generator=torch.Generator().manual_seed(0))
WIDE = V2 | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "initializer_range": 0.06,
    "num_experts_per_tok": 8,  # all, since rounding turns close choices over
}


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def logits(path: Path) -> Tensor:
    return moescope.load(path, dtype="float32", backend="torch").logits(IDS)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(network(WIDE), tmp_path_factory.mktemp("model") / "model.gguf", "F32")


@needs_extension
@pytest.mark.parametrize(("to", "bound"), [("f16", 0.01), ("q8_0", 0.05), ("q4_k_m", 0.5)])
def test_a_file_becomes_a_smaller_one_with_all_it_says(
    model: Path, tmp_path: Path, to: str, bound: float, capsys: Any
) -> None:
    out = tmp_path / "out.gguf"
    assert run(["quantize", str(model), "--to", to, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bits_per_weight"] < 17 and sum(told["types"].values()) == len(types(model))
    before, after = logits(model), logits(out)
    assert float((before - after).norm() / before.norm()) < bound
    fields = [gguf.GGUFReader(path).fields for path in (model, out)]
    same = set(fields[0]) - {"general.file_type"}
    assert {key for key in same if not key.startswith("GGUF.")} <= set(fields[1])
    for key in same:
        if not key.startswith("GGUF."):
            assert fields[0][key].contents() == fields[1][key].contents()
            assert fields[0][key].types[0] == fields[1][key].types[0]


@needs_extension
@pytest.mark.parametrize("to", ["q4_k_m", "q4_0", "q5_k_m", "mxfp4_moe"])
@pytest.mark.parametrize("width", [256, 96])
def test_types_are_those_that_llama_cpp_gives(tmp_path: Path, to: str, width: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    fields: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    }
    if to == "mxfp4_moe":
        fields |= {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
        fields |= {"moe_intermediate_size": 64}
    source = write(network(fields), tmp_path / "model.gguf", "F32")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert run(["quantize", str(source), "--to", to, "--out", str(ours)]) == 0
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(FILE_TYPES[to].number)
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(theirs), params) == 0
    assert types(ours) == types(theirs)


@needs_extension
def test_llama_cpp_computes_the_same_from_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out.gguf"
    assert run(["quantize", str(model), "--to", "q4_k_m", "--out", str(out)]) == 0
    theirs = logits_of_llama_cpp(out, IDS)
    exact = logits(out)
    assert float((theirs - exact).norm() / exact.norm()) < 0.05  # it rounds activations
    held = moescope.load(out).logits(IDS)[0]
    assert float((held - exact).norm() / exact.norm()) < 0.05


@needs_extension
def test_a_folder_becomes_a_file_with_its_tokenizer(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "tiny.gguf"
    assert run(["quantize", "tiny", "--to", "q8_0", "--out", str(out)]) == 0
    assert "bits a weight" in capsys.readouterr().out
    before, after = moescope.load("tiny"), moescope.load(out)
    text = "It's 床前明月光 12345\n\n\tx 😀"
    assert after.engine.encode(text) == before.engine.encode(text)
    assert after.engine.end_ids == before.engine.end_ids
    assert after.tokenizer.chat_templates == before.tokenizer.chat_templates
    ids = torch.tensor([before.engine.encode(text)])
    left, right = before.logits(ids), after.logits(ids)
    assert float((left - right).norm() / left.norm()) < 0.05
    llama_cpp = pytest.importorskip("llama_cpp")
    judge = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    assert judge.tokenize(text.encode(), special=True) == before.engine.encode(text)


@pytest.mark.parametrize(("to", "bound"), [("int8", 0.05), ("bf16", 0.05)])
def test_a_folder_becomes_a_folder(tmp_path: Path, to: str, bound: float) -> None:
    out = tmp_path / "out"
    assert run(["quantize", "tiny", "--to", to, "--out", str(out)]) == 0
    before, after = moescope.load("tiny", dtype="float32"), moescope.load(out, dtype="float32")
    ids = torch.tensor([before.engine.encode("春眠不觉晓")])
    left, right = before.logits(ids), after.logits(ids)
    assert float((left - right).norm() / left.norm()) < bound
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("to", "out", "sentence"),
    [
        ("int4", "x.gguf", "write q4_k_m into a .gguf file"),
        ("int8", "x.gguf", "a GGUF file holds no int8"),
        ("q4_k_m", "x", "name a file that ends in .gguf"),
        ("q9", "x.gguf", "there is no 'q9' to round to"),
        ("f16", "there.gguf", "is there already"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, to: str, out: str, sentence: str, capsys: Any
) -> None:
    (tmp_path / "there.gguf").write_text("")
    assert run(["quantize", "tiny", "--to", to, "--out", str(tmp_path / out)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and sentence in told[0]


@pytest.mark.parametrize(("to", "out"), [("int8", "x"), ("bf16", "x"), ("q8_0", "x.gguf")])
def test_what_is_no_number_is_not_rounded_to_one(
    tmp_path: Path, to: str, out: str, capsys: Any
) -> None:
    damaged = tmp_path / "damaged"
    moescope.load("tiny").save(damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = math.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert run(["quantize", str(damaged), "--to", to, "--out", str(tmp_path / out)]) == 2
    assert "layers.1.self_attn.o_proj.weight holds values that" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    out = tmp_path / "x.gguf"
    assert run(["quantize", "tiny", "--to", "bf16", "--out", str(out)]) == 2
    assert "the disk has 0.00 GB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_cannot_become_a_file(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(BOX / "tiny" / name)
    assert run(["quantize", str(folder), "--to", "bf16", "--out", str(tmp_path / "x.gguf")]) == 2
    assert "there is none; put its tokenizer.json beside" in capsys.readouterr().err


def test_rows_that_are_no_whole_blocks_have_the_next_wider_type() -> None:
    def kind(name: str, columns: int) -> str:
        shape = (64, columns)
        return tensor_type(name, shape, FILE_TYPES["q4_k_m"], 8, 0, tied=False).name

    assert kind("blk.3.attn_q.weight", 256) == "Q4_K"
    assert kind("blk.3.attn_q.weight", 96) == "Q5_0"
    assert kind("output.weight", 96) == "Q8_0"
    assert kind("blk.3.attn_q.weight", 48) == "F16"
    assert kind("blk.0.ffn_gate_inp.weight", 256) == "F32"
