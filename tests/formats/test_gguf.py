"""GGUF files are read as llama.cpp reads them.

Where `llama-cpp-python` is installed, llama.cpp itself is the judge: of logits, of the numbers in
quantised blocks, and of how text is cut into tokens. Where it is not, the network that was written
is, and the `gguf` library for the blocks.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import (
    V2,
    V3,
    VARIANTS,
    Vocabulary,
    logits_of_llama_cpp,
    network,
    write,
)
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as BackendTokenizer, models, pre_tokenizers, trainers
from torch import Tensor

import moescope
from moescope.api import Model
from moescope.checkpoint import load_model
from moescope.cli.main import run
from moescope.config import ModelConfig
from moescope.families import config_fields
from moescope.formats.gguf.container import GgufFile

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed")
LAYOUTS: dict[str, dict[str, bool]] = {
    "split": {},
    "kv_b whole": {"fused_kv_b": True},
    "gate and up in one": {"fused_gate_up": True},
}
IDS = torch.randint(0, 320, (1, 100), generator=torch.Generator().manual_seed(0))


def theirs(path: Path, **options: Any) -> Tensor:
    return logits_of_llama_cpp(path, IDS, **options)


def ours(path: Path) -> Tensor:
    return moescope.load(path, dtype="float32").logits(IDS)[0]


def told(config: ModelConfig) -> dict[str, Any]:
    """What a file keeps of a config."""
    return config.model_dump(exclude={"initializer_range", "eos_token_id"})


def relative(left: Tensor, right: Tensor) -> Tensor:
    """How far the logits of each position are apart, `(seq,)`."""
    return (left - right).abs().amax(dim=-1) / right.abs().amax(dim=-1)


def requantized(path: Path, kind: str) -> Path:
    """Have llama.cpp write the same model in another type."""
    assert llama_cpp is not None
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    params.nthread, params.allow_requantize = 1, True
    made = path.with_name(f"{path.stem}-{kind}.gguf")
    assert llama_cpp.llama_model_quantize(bytes(path), bytes(made), params) == 0
    return made


# --- logits --------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_llama_cpp(variant: str, layout: str, tmp_path: Path) -> None:
    made = network(VARIANTS[variant])
    path = write(made, tmp_path / "model.gguf", **LAYOUTS[layout])
    assert float(relative(ours(path), theirs(path)).max()) < 1e-4


@needs_llama_cpp
@pytest.mark.parametrize(("file_type", "bound"), [("F16", 5e-3), ("BF16", 3e-2), ("Q8_0", 5e-2)])
@pytest.mark.parametrize("fields", [V2, V3], ids=["V2", "V3"])
def test_logits_are_those_of_llama_cpp_up_to_its_rounding_of_activations(
    fields: dict[str, Any], file_type: str, bound: float, tmp_path: Path
) -> None:
    """The median token counts: rounding makes some routers choose another expert."""
    path = write(network(fields), tmp_path / "model.gguf", file_type)
    assert float(relative(ours(path), theirs(path)).median()) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_network_comes_back(variant: str, layout: str, tmp_path: Path) -> None:
    made = network(VARIANTS[variant])
    path = write(made, tmp_path / "model.gguf", **LAYOUTS[layout])
    opened = load_model(path, dtype=torch.float32)
    assert told(opened.config) == told(made.config)
    expected, held = made.state_dict(), opened.state_dict()
    assert expected.keys() == held.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, held[name]), name


def test_published_shapes_come_back(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite and V3 with four layers and narrow matrices; all else is as published."""
    narrow = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 300}
    narrow |= {"moe_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    for name in ("deepseek-v2-lite", "deepseek-v3"):
        fields = config_fields(moescope.plan(name).config) | narrow
        made = network(fields | {"num_nextn_predict_layers": 0})
        config = moescope.plan(write(made, tmp_path / "model.gguf", "F16")).config
        assert told(config) == told(made.config)


# --- quantised blocks ----------------------------------------------------------------------------

BLOCKS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
BLOCKS += ["Q2_K", "Q3_K", "IQ4_NL"]


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 300))
def test_any_block_is_multiplied_out_as_the_library_does(
    kind: str, seed: int, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind_number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind_number]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, 512 // block * size), dtype=np.uint8)
    path = tmp_path_factory.mktemp("blocks") / "tensor.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_tensor("first", np.zeros(7, np.float32))
    writer.add_tensor("matrix", raw, raw_dtype=kind_number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.tensors["matrix"].shape == (rows, 512)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind_number)))
    held = file.read("matrix", torch.float32)
    torch.testing.assert_close(held, expected, rtol=0, atol=0, equal_nan=True)
    row = file.read("matrix", torch.float32, entry=rows - 1)
    torch.testing.assert_close(row, expected[-1], rtol=0, atol=0, equal_nan=True)
    exact = file.read("matrix")
    assert exact.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
    torch.testing.assert_close(exact.float(), expected, rtol=0, atol=0, equal_nan=True)


WIDE = V3 | {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 96}
"""Rows of 256 can be K-quantised; llama.cpp takes Q5_0 and others for those of 96 and 32."""


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", ["MOSTLY_Q8_0", "MOSTLY_Q4_0", "MOSTLY_Q4_K_M", "MOSTLY_Q6_K", "MOSTLY_Q5_K_M"]
)
def test_llama_cpps_own_files_are_multiplied_out_as_llama_cpp_does(
    kind: str, tmp_path: Path
) -> None:
    whole = write(network(WIDE), tmp_path / "model.gguf", "F32")
    quantized = requantized(whole, kind)
    again = requantized(quantized, "ALL_F32")
    held, expected = GgufFile(quantized), GgufFile(again)
    kinds = {held.tensors[name].kind for name in expected.tensors}
    assert kinds & {"Q8_0", "Q4_0", "Q4_K", "Q6_K"}
    for name in expected.tensors:
        left, right = held.read(name, torch.float32), expected.read(name, torch.float32)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)
    assert float(relative(ours(quantized), theirs(again)).max()) < 1e-3
    assert float(relative(ours(quantized), theirs(quantized)).median()) < 0.1


# --- vocabularies --------------------------------------------------------------------------------

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
TEXTS = [
    "The moon before my bed, is it frost? It's 2024; don't you know?\n" * 3,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3,
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [1, 22, 333, 4444]}\n\n\n" * 3,
    "Привет, мир! Ελληνικά. ひらがな カタカナ 한국어 العربية 😀👍🏽  e\u0301 \u00a0 ß µ\r\n" * 3,
]
PIECES = [
    "\r\n",
    "\n",
    "  ",
    " ",
    "\t",
    "'s",
    "A",
    "the",
    " moon",
    "12",
    "3",
    "４",
    "!",
    "，",
    " (",
]
PIECES += ["月", "ひ", "カ", "한", "Ж", "ß", "µ", "e\u0301", "😀", "_", "$", "«", "—", *SPECIAL]


def vocabulary(rules: str, **more: Any) -> Vocabulary:
    """Train a small vocabulary on uncut text, so that merges tell where `rules` cut."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [line for text in TEXTS for line in text.splitlines(keepends=True)]
    pairs = [left + right for left in PIECES[:-4] for right in PIECES[:-4]]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator(lines + pairs, trainer)
    made = json.loads(backend.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].__getitem__)
    types = [gguf.TokenType.CONTROL] * len(SPECIAL)
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    merges = [" ".join(pair) for pair in made["merges"]]
    return Vocabulary(tokens, merges, types, rules, bos_token_id=0, eos_token_id=1, **more)


@pytest.fixture(scope="module", params=["deepseek-llm", "deepseek-coder", "deepseek-v3"])
def vocabulary_file(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    held = vocabulary(request.param, chat_templates={"default": "{{ messages[0]['content'] }}"})
    made = network(V2 | {"vocab_size": len(held.tokens)})
    return write(made, tmp_path_factory.mktemp("vocabulary") / "model.gguf", vocabulary=held)


@needs_llama_cpp
def test_text_is_cut_as_llama_cpp_cuts_it(vocabulary_file: Path) -> None:
    assert llama_cpp is not None
    judge = llama_cpp.Llama(str(vocabulary_file), vocab_only=True, verbose=False)
    tokenizer = moescope.load(vocabulary_file).tokenizer

    @settings(max_examples=300)
    @given(
        st.one_of(
            st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(TEXTS)
        )
    )
    def same(text: str) -> None:
        expected = judge.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected, skip_special_tokens=False) == text

    same()


def test_special_tokens_and_the_chat_form_are_the_files(vocabulary_file: Path) -> None:
    model = moescope.load(vocabulary_file)
    tokenizer = model.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, model.config.eos_token_id) == (0, 1, 1)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert not tokenizer.begin_ids
    assert tokenizer.encode("<｜User｜>") == [2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "月"}]) == "月"


def test_a_vocabulary_of_an_unknown_kind_is_taken_from_a_file_beside(
    model: Model, tmp_path: Path
) -> None:
    held = vocabulary("afmoe")
    made = network(V2 | {"vocab_size": len(held.tokens)})
    path = write(made, tmp_path / "model.gguf", vocabulary=held)
    with pytest.raises(moescope.UserError, match=r"the rules 'afmoe'.*put the model's tokenizer"):
        moescope.load(path)
    model.tokenizer.save(tmp_path)
    assert moescope.load(path).tokenizer.hash == model.tokenizer.hash


# --- a checkpoint like any other -----------------------------------------------------------------


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_packed_for_the_native_kernels_it_is_the_same_as_from_safetensors(
    weight_format: str, tmp_path: Path, vocabulary_file: Path
) -> None:
    opened = moescope.load(vocabulary_file, backend="torch")
    opened.save(tmp_path)
    left, right = (
        moescope.load(at, dtype="float32", quantize=weight_format).logits(IDS[:, :20])
        for at in (vocabulary_file, tmp_path)
    )
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_command_line_takes_a_file(
    vocabulary_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "--max-tokens", "3", "--json"], ["explain", "--json"]):
        assert run([*command, "--model", str(vocabulary_file), "床前"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert run(["plan", str(vocabulary_file), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["config"]["n_routed_experts"] == 8
    assert planned["source"] == str(vocabulary_file)


def test_a_model_in_several_files_is_opened_by_the_first(tmp_path: Path) -> None:
    made = network(V3)
    whole = GgufFile(write(made, tmp_path / "model.gguf", "Q8_0"))
    names = list(whole.tensors)
    parts = [names[:7], names[7:30], names[30:]]
    paths = [tmp_path / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, (path, held) in enumerate(zip(paths, parts, strict=True)):
        reader = gguf.GGUFReader(whole.path)
        writer = gguf.GGUFWriter(path, "deepseek2")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, sub)
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", number)
        for tensor in reader.tensors:
            if tensor.name in held:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert torch.equal(ours(paths[0]), ours(whole.path))
    with pytest.raises(moescope.UserError, match="one part of 3; name the one that ends in -00001"):
        moescope.load(paths[1].rename(tmp_path / "other.gguf"))
    with pytest.raises(moescope.UserError, match=r"there is no .*m-00002-of-00003.gguf"):
        moescope.load(paths[0])
