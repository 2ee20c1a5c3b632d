"""Networks on the native kernels say what those on PyTorch say, with and without the extension."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packing import SMALL, expert_reader
from torch import Tensor

from moescope.api import Model, load
from moescope.checkpoint import save_weights
from moescope.cli.main import run
from moescope.errors import UserError
from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.cache import Cache
from moescope.model.costs import count_parameters
from moescope.model.decoder import CausalLM, Decoder, initialise
from moescope.model.steering import Steering, steered
from moescope.native.decoder import NativeDecoder
from moescope.native.experts import NativeMoE
from moescope.native.network import Packer

ROOT = Path(__file__).parents[2]
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 12,
    "v_head_dim": 20,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "v3": {**EXPERTS, **LATENT, "model_type": "deepseek_v3", "q_lora_rank": 33},
    "v2, biased": {**EXPERTS, **LATENT, "model_type": "deepseek_v2", "attention_bias": True},
    "v2, tied, no shared experts": {
        **EXPERTS,
        **LATENT,
        "model_type": "deepseek_v2",
        "n_shared_experts": 0,
        "tie_word_embeddings": True,
    },
    "moe": {**EXPERTS, "model_type": "deepseek"},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "v3 with multi-token prediction": {
        **EXPERTS,
        **LATENT,
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
    },
}


def network(family: str, seed: int = 0) -> CausalLM:
    made = CausalLM(read_config({**SMALL, **FAMILIES[family]}))
    initialise(made, seed)
    return made.eval().requires_grad_(False)


def packed(model: CausalLM, weight_format: str) -> CausalLM:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packer, made = Packer(weight_format), copy.deepcopy(model)
    packer.pack(made, weights.__getitem__, expert_reader(weights))
    return made


@torch.inference_mode()
def prefill(model: CausalLM, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


@torch.inference_mode()
def token_by_token(model: CausalLM, ids: Tensor, prompt: int) -> Tensor:
    cache = Cache()
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    parts = [model(ids[:, :prompt], positions[:, :prompt], cache)]
    parts += [
        model(ids[:, at : at + 1], positions[:, at : at + 1], cache)
        for at in range(prompt, ids.shape[1])
    ]
    return model.logits(torch.cat(parts, dim=1))


def difference(ours: Tensor, expected: Tensor) -> float:
    """Median over tokens of the relative error: a few tokens may go to another expert."""
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.median())


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.extension, "native", None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
def test_packed_networks_agree_with_rounded_ones(
    family: str, weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu.available():
        pytest.skip("tests/kernels/test_cpu.py says why this is fine")
    original = network(family)
    native = packed(original, weight_format)
    with monkeypatch.context() as patched:
        without_extension(patched)
        rounded_only = packed(original, weight_format)
    ids = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = prefill(rounded_only, ids)
    # Beside integer weights the kernels round activations to int8, and PyTorch does not; in int4,
    # absorbed keys have their scales along another axis than expanded ones.
    whole, single = {"int8": (0.04, 0.04), "int4": (0.1, 0.13), "bf16": (1e-3, 1e-3)}[weight_format]
    assert difference(prefill(native, ids), expected) < whole
    assert difference(token_by_token(native, ids, 10), expected) < single
    bound = 0.04 if weight_format == "int8" else 0.6  # random weights amplify every error
    assert difference(expected, prefill(original, ids)) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_stay_those_of_the_network(family: str) -> None:
    original = network(family)
    expected = count_parameters(original.config).total
    native = packed(original, "int8")
    assert sum(parameter.numel() for parameter in native.parameters()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_in_one_call_equal_their_parts(family: str) -> None:
    if not cpu.available():
        return
    joined, apart = packed(network(family), "bf16"), packed(network(family), "bf16")
    apart.model.__class__ = Decoder  # the same modules, one after another
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(2))
    found, expected = token_by_token(joined, ids, 9), token_by_token(apart, ids, 9)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["v3", "v2, biased", "moe", "qwen2"]),
    batch=st.integers(1, 3),
    first=st.one_of(st.integers(1, 9), st.integers(90, 130)),
    second=st.integers(0, 60),
    seed=st.integers(0, 100),
)
def test_prompts_in_parts_equal_prompts_layer_by_layer(
    isa: str, family: str, batch: int, first: int, second: int, seed: int
) -> None:
    before = cpu.instruction_set()
    assert before is not None
    model = network(family, seed)
    joined, apart = packed(model, "bf16"), packed(model, "bf16")
    apart.model.__class__ = Decoder
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (batch, first + second + 2), generator=generator)
    cpu.use_instruction_set(isa)
    try:
        found, expected = (in_parts(m, ids, [first, second, 1, 1]) for m in (joined, apart))
    finally:
        cpu.use_instruction_set(before)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["v3", "v2, biased", "moe", "qwen2"]),
    batch=st.integers(1, 3),
    parts=st.lists(st.integers(2, 90), min_size=2, max_size=3),
    seed=st.integers(0, 100),
)
def test_prompts_in_parts_equal_prompts_read_whole_bit_for_bit(
    isa: str, weight_format: str, family: str, batch: int, parts: list[int], seed: int
) -> None:
    before = cpu.instruction_set()
    assert before is not None
    model = packed(network(family, seed), weight_format)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (batch, sum(parts) + 2), generator=generator)
    cpu.use_instruction_set(isa)
    try:
        found, expected = (in_parts(model, ids, [*p, 1, 1]) for p in (parts, [sum(parts)]))
    finally:
        cpu.use_instruction_set(before)
    assert torch.equal(found, expected)


@torch.inference_mode()
def in_parts(model: CausalLM, ids: Tensor, lengths: list[int]) -> Tensor:
    """Normed states of `ids`, read in parts of these lengths."""
    cache, start, parts = Cache(), 0, []
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    for length in filter(None, lengths):
        part = slice(start, start + length)
        parts.append(model(ids[:, part], positions[:, part], cache))
        start += length
    return torch.cat(parts, dim=1)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 4),
    vocab=st.one_of(st.integers(1, 40), st.integers(250, 1100)),
    ties=st.booleans(),
    data=st.data(),
)
def test_the_likeliest_are_those_that_sorting_finds(
    rows: int, vocab: int, ties: bool, data: st.DataObject
) -> None:
    if not cpu.available():
        return
    count = data.draw(st.integers(1, min(vocab, 70)))
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits = logits.round() if ties else logits
    ids, values = cpu.likeliest(logits, count)
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, ordered.indices[:, :count])
    assert torch.equal(values, ordered.values[:, :count])
    for scale in (1.0, 0.3):
        exact = (logits.double() * scale).logsumexp(-1)
        torch.testing.assert_close(
            cpu.log_sums(logits, scale).double(), exact, rtol=1e-5, atol=1e-5
        )


@torch.inference_mode()
def test_an_id_outside_the_vocabulary_is_refused() -> None:
    if not cpu.available():
        return
    with pytest.raises(ValueError, match="an id is not in the vocabulary"):
        packed(network("v3"), "int8")(torch.tensor([[300]]))


@pytest.mark.parametrize("family", ["v3", "moe"])
@pytest.mark.parametrize(
    "steering",
    [
        Steering(num_experts_per_tok=5, forced=[(1, 2), (2, 0)]),
        Steering(disabled=[(1, 0), (1, 1), (2, 7)], bias={(2, 3): 0.5}),
        Steering(rule="random"),
    ],
)
def test_steered_networks_stay_in_one_call(family: str, steering: Steering) -> None:
    if not cpu.available():
        return
    native = packed(network(family), "bf16")
    other = steered(native, steering)
    apart = steered(packed(network(family), "bf16"), steering)
    apart.model.__class__ = Decoder  # the same modules, with the routers of PyTorch
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    plain = token_by_token(native, ids, 9)
    assert difference(token_by_token(other, ids, 9), token_by_token(apart, ids, 9)) < 1e-5
    assert difference(token_by_token(other, ids, 9), plain) > 1e-3
    assert isinstance(other.model, NativeDecoder) and other.model.all_layers is not None
    assert torch.equal(token_by_token(native, ids, 9), plain), "the original is as it was"


def test_a_rule_of_pytorch_alone_is_computed_layer_by_layer() -> None:
    if not cpu.available():
        return
    native = packed(network("v3"), "int8")
    noisy = steered(native, Steering(noise=0.01))
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    assert difference(prefill(noisy, ids), prefill(native, ids)) < 0.2
    assert isinstance(noisy.model, NativeDecoder) and noisy.model.all_layers is None


def test_a_packed_model_does_all_that_a_model_does(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path)
    plain = load(tmp_path)
    for options in ({"backend": "cpu"}, {"quantize": "int8"}, {"quantize": "int4"}):
        opened = load(tmp_path, **options)
        generation = opened.generate("床前明月光", max_tokens=8)
        assert len(generation.tokens) == 8
        together = opened.generate(["床前明月光", "the moon"], max_tokens=8)
        assert together[0].text == generation.text
        assert "".join(t.text for t in opened.stream("床前", max_tokens=4))
        trace, expected = opened.trace("the moon"), plain.trace("the moon")
        assert trace.total_parameters == expected.total_parameters
        assert [t.parameters_used for t in trace.tokens] == [
            t.parameters_used for t in expected.tokens
        ]
        steered = opened.steer(num_experts_per_tok=1)
        assert steered.generate("床前明月光", max_tokens=3).tokens
        nobody = opened.steer(disabled=[(1, expert) for expert in range(4)])
        ids = torch.tensor(opened.tokenizer.encode("床前明月光，疑是地上霜。"))[None]
        expected = prefill(nobody.network, ids)
        assert difference(token_by_token(nobody.network, ids, 2), expected) < 0.2
        if cpu.available():
            with pytest.raises(UserError, match="packed weights only"):
                opened.save(tmp_path / "again")


def test_packing_from_files_is_packing_from_memory(model: Model, tmp_path: Path) -> None:
    save_weights(model.network, tmp_path)
    model.tokenizer.save(tmp_path)
    ids = torch.arange(20)[None]
    from_memory = prefill(packed(model.network, "int8"), ids)
    assert torch.equal(load(tmp_path, quantize="int8").logits(ids), from_memory)


def test_without_the_extension_everything_still_runs(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    without_extension(monkeypatch)
    assert cpu.instruction_set() is None and cpu.instruction_sets() == []
    opened = load(tmp_path, backend="cpu", quantize="int8")
    assert not any(isinstance(module, NativeMoE) for module in opened.network.modules())
    ids = torch.arange(20)[None]
    difference_to_plain = difference(opened.logits(ids), model.logits(ids))
    assert 0 < difference_to_plain < 0.05
    assert opened.generate("床前明月光", max_tokens=4).tokens


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "gpu"}, "backend is 'gpu'; choose from torch, cpu"),
        ({"quantize": "int3"}, "quantize is 'int3'; choose from int8, int4"),
        ({"backend": "torch", "quantize": "int8"}, 'backend "torch" rounds nothing'),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load("nowhere", **options)


def test_too_little_memory_is_said_before_loading() -> None:
    with pytest.raises(UserError, match=r"takes 0\.0 GiB in int8, but 0\.0 GiB are free"):
        Packer("int8").refuse_if_too_large(network("v3").config, available=1000)


# --- the build -----------------------------------------------------------------------------------


def build_script() -> Any:
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_compiler_is_one_sentence_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build_script().build_native(tmp_path) is None
    printed = capsys.readouterr().out
    assert "no C++ compiler was found" in printed and len(printed.splitlines()) == 1


def test_a_compiler_that_fails_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "false")
    (tmp_path / "csrc").mkdir()
    for source in (ROOT / "csrc").glob("*"):
        if source.is_file():
            (tmp_path / "csrc" / source.name).write_bytes(source.read_bytes())
    assert build_script().build_native(tmp_path) is None
    assert "could not build the native CPU kernels" in capsys.readouterr().out


# --- the command line ----------------------------------------------------------------------------


def test_the_verbs_take_backend_and_quantize(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path)
    options = ["--model", str(tmp_path), "--backend", "cpu", "--quantize", "int8"]
    for verb in (["generate", "床前", "--max-tokens", "3"], ["explain", "床前", "--json"]):
        assert run([*verb, *options]) == 0
        assert capsys.readouterr().out
    assert run(["generate", "床前", "--quantize", "int5"]) == 2
    assert "quantize is 'int5'" in capsys.readouterr().err


@pytest.mark.parametrize("built", [True, False])
def test_doctor_says_which_kernels_run(
    built: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built:
        without_extension(monkeypatch)
    monkeypatch.setattr("moescope.cli.doctor.SECONDS", 0.01)
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["native_instruction_set"] == cpu.instruction_set()
    path = told["paths"]["--backend cpu"]
    if cpu.available():
        assert path.startswith(f"native kernels, {cpu.instruction_set()}")
    else:
        assert "not built" in path and "several times slower" in path


def test_doctor_tells_a_wrong_instruction_set() -> None:
    if not cpu.available():
        return
    program = "import sys; from moescope.cli.main import run; sys.exit(run(['doctor']))"
    environment = {**os.environ, "MOESCOPE_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "this processor runs" in done.stderr
