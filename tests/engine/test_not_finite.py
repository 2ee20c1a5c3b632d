"""What is no number ends a text with a sentence that says where it begins."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import VARIANTS
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from torch import nn

import moescope
from moescope import checkpoint
from moescope.api import Model
from moescope.cli.main import run
from moescope.engine import not_finite as not_finite_module
from moescope.engine.not_finite import NotFinite
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM, initialise
from moescope.server.apis import Access, create_api
from moescope.server.model_thread import ModelThread

PROMPT = "床前明月光, is it frost?"
OPTIONS: list[dict[str, Any]] = [{}, {"quantize": "bf16"}]
QUANTIZED: list[dict[str, Any]] = [{"quantize": kind} for kind in ("int8", "int4", "bf16")]
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the kernels were not built")


def spoilt(model: Model, folder: Path, name: str, at: Any, value: float = math.nan) -> Path:
    """Save a model with one value of one tensor replaced."""
    model.save(folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][at] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


IN = "model.layers.1."
CASES: dict[str, tuple[str, Any, str]] = {
    "attention": (f"{IN}self_attn.o_proj.weight", (3, 5), "layer 1 .*layers.1.self_attn.o_proj"),
    "latent": (f"{IN}self_attn.kv_b_proj.weight", (3, 5), "layer 1 .*layers.1.self_attn.kv_b_proj"),
    "dense": ("model.layers.0.mlp.up_proj.weight", (3, 5), r"layer 0 .*layers.0.mlp"),
    "shared": (f"{IN}mlp.shared_experts.up_proj.weight", (3, 5), "layer 1 .*1.mlp.shared_experts"),
    "head": ("lm_head.weight", (3, 5), "the output head .*tensor lm_head"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_and_tensor_are_named(
    case: str, value: float, model: Model, tmp_path: Path
) -> None:
    name, at, words = CASES[case]
    opened = moescope.load(spoilt(model, tmp_path, name, at, value))
    for sampling in ({}, {"temperature": 1.0, "seed": 1}):
        with pytest.raises(UserError, match=f"{words}.*fetch the model again"):
            opened.generate(PROMPT, **sampling)
        with pytest.raises(UserError, match=words):
            list(opened.stream(PROMPT, **sampling))


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_packed_weights_that_became_so_are_named_too(
    case: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "refuse_if_not_finite", lambda *_: None)
    name, at, words = CASES[case]
    opened = moescope.load(spoilt(model, tmp_path, name, at), quantize="bf16")
    with pytest.raises(UserError, match=f"{words}.*fetch the model again"):
        opened.generate(PROMPT)


@pytest.mark.parametrize("options", QUANTIZED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_to_be_rounded_is_looked_at_when_loaded(
    case: str, value: float, options: dict[str, Any], model: Model, tmp_path: Path
) -> None:
    name, at, _ = CASES[case]
    folder = spoilt(model, tmp_path, name, at, value)
    with pytest.raises(UserError, match=r"the tensor .* holds values that are not finite \(1 of"):
        moescope.load(folder, **options)


@pytest.mark.parametrize("options", [OPTIONS[0], pytest.param(OPTIONS[1], marks=needs_kernels)])
def test_an_expert_is_named_once_a_token_visits_it(
    options: dict[str, Any], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "refuse_if_not_finite", lambda *_: None)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    opened = moescope.load(spoilt(model, tmp_path, name, (0, 0)), **options)
    words = r"layer 2 .*layers.2.mlp.experts.*5"
    with pytest.raises(UserError, match=words):
        opened.steer(forced=[(2, 5)]).generate(PROMPT)
    assert opened.steer(disabled=[(2, 5)]).generate(PROMPT, max_tokens=4).tokens


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        f"{IN}mlp.gate.weight",
        f"{IN}mlp.gate.e_score_correction_bias",
        f"{IN}input_layernorm.weight",
    ],
)
def test_norms_routers_and_biases_are_looked_at_when_loaded(
    name: str, model: Model, tmp_path: Path
) -> None:
    folder = spoilt(model, tmp_path, name, 3)
    for options in OPTIONS:
        with pytest.raises(
            UserError, match=rf"tensor {name} holds values that are not finite \(\d+ of "
        ):
            moescope.load(folder, **options)


def test_the_tensor_is_found_though_a_whole_text_may_hide_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(VARIANTS["qwen3_moe"].to_dict() | {"vocab_size": 300})
    network = CausalLM(config)
    initialise(network, seed=0)
    with torch.no_grad():
        network.model.layers[2].self_attn.q_proj.weight[2, 3] = math.inf
    # Attention over a whole text makes zeros of what is no number, on some processors.
    see = not_finite_module._FirstNotFinite._see
    monkeypatch.setattr(
        not_finite_module._FirstNotFinite,
        "_see",
        lambda recorder, states, *names: see(recorder, states.nan_to_num(0), *names),
    )
    with pytest.raises(NotFinite, match=r"network .*layers.2.self_attn.q_proj.weight \(at \[2, 3"):
        Model("hidden", network, model.tokenizer).generate("the moon", max_tokens=9)


@pytest.mark.parametrize("verb", ["specialize", "ablate", "compare"])
def test_measures_of_much_text_end_so_too(
    verb: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, at, words = CASES["dense"]
    folder = str(spoilt(model, tmp_path / "model", name, at))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"the moon before my bed, is it frost? {number}")
    arguments = {
        "specialize": [folder, str(texts)],
        "ablate": [folder, str(texts), "--layer", "1"],
        "compare": [folder, "tiny", "--text", str(texts), "--rounds", "1"],
    }
    assert run([verb, *arguments[verb]]) == 2
    assert re.search(f"{words}.*fetch the model again", capsys.readouterr().err)


def test_numbers_too_large_for_the_type_are_told_apart(model: Model) -> None:
    network = Model("large", model.network, model.tokenizer).network
    with torch.no_grad():
        weight = network.model.layers[1].mlp.shared_experts.up_proj.weight
        kept = weight.clone()
        weight.fill_(3e38)
        with pytest.raises(NotFinite, match=r"layer 1 .* although its weights are; .* float32"):
            model.generate(PROMPT)
        weight.copy_(kept)
    assert model.generate(PROMPT, max_tokens=2).tokens


def spoil_a_token(model: Model, folder: Path) -> Model:
    """Spoil the embedding of one token, so that only texts with it are spoilt."""
    (token_id,) = model.tokenizer.encode("😀"[:1])[-1:]
    return moescope.load(spoilt(model, folder, "model.embed_tokens.weight", (token_id, 0)))


def test_only_the_row_that_has_no_numbers_ends(model: Model, tmp_path: Path) -> None:
    opened = spoil_a_token(model, tmp_path)
    assert isinstance(opened.network.model.embed_tokens, nn.Embedding)
    thread = ModelThread(opened.engine, 4, 2**24)
    events: dict[int, list[Any]] = {0: [], 1: []}
    params = SamplingParams(max_tokens=6)
    for row, prompt in enumerate(["the moon", "the moon 😀"]):
        thread.submit(opened.engine.encode(prompt), params, events[row].append, row)
    expected = opened.generate("the moon", max_tokens=6)
    deadline = time.monotonic() + 60
    while len(events[0]) < len(expected.tokens) or not events[1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.close()
    assert [token.id for token in events[0]] == [token.id for token in expected.tokens]
    assert isinstance(events[1][0], NotFinite) and "the embedding" in str(events[1][0])


def test_a_server_answers_500_with_the_sentence(model: Model, tmp_path: Path) -> None:
    opened = spoil_a_token(model, tmp_path)
    thread = ModelThread(opened.engine, 4, 2**24)
    with TestClient(create_api(opened, thread, name="m", access=Access("k"))) as client:
        headers = {"Authorization": "Bearer k"}
        for stream in (False, True):
            question = {"prompt": "moon 😀", "max_tokens": 4, "stream": stream}
            answer = client.post("/v1/completions", json=question, headers=headers)
            if stream:
                told = json.loads(answer.text.strip().removeprefix("data: "))["error"]
            else:
                assert answer.status_code == 500
                told = answer.json()["error"]
            assert told["code"] == 500 and told["type"] == "server_error"
            assert "embedding computes values that are not finite" in told["message"]
        question = {"prompt": "the moon", "max_tokens": 4}
        assert client.post("/v1/completions", json=question, headers=headers).status_code == 200


def test_what_goes_wrong_is_told_on_a_line_of_its_own(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoilt(model, tmp_path, "lm_head.weight", (3, 5))
    assert run(["generate", "--model", str(folder), PROMPT]) == 2
    said = capsys.readouterr()
    assert said.out == f"{PROMPT}\n" and said.err.startswith("moescope: ")


def test_the_command_line_says_it_in_a_sentence(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoilt(model, tmp_path, "lm_head.weight", (3, 5))
    assert run(["generate", "--model", str(folder), "--json", PROMPT]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "lm_head.weight" in said.err
