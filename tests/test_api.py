import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moescope
from moescope.api import Model
from moescope.errors import UserError


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    return folder


def test_a_saved_model_loads_with_the_same_logits(model: Model, folder: Path) -> None:
    loaded = moescope.load(folder)
    input_ids = torch.tensor([model.tokenizer.encode("the moon before my bed")])
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.logits(input_ids), model.logits(input_ids))
    assert loaded.logits(input_ids).dtype == torch.float32


def test_dtype_is_what_was_asked_for(folder: Path) -> None:
    weights = moescope.load(folder, dtype="bfloat16").network.model.embed_tokens.weight
    assert weights.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tinny", 'there is no model .tinny.; give "tiny"'),
        ("./nowhere", "there is no model"),
        ("a/b/c", "there is no model"),
    ],
)
def test_an_unknown_model_is_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        moescope.load(name)


def test_an_unknown_dtype_is_a_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match="dtype is 'int3'; choose from float32, bfloat16"):
        moescope.load(folder, dtype="int3")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.api.memory", lambda: (2**30, 1000))
    monkeypatch.setattr("moescope.api.load_model", None)
    for options, said in (({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")):
        with pytest.raises(UserError, match=rf"takes 0\.0 GiB in {said}, but 0\.0 GiB are free"):
            moescope.load(folder, **options)
    with pytest.raises(UserError, match=r"takes 0\.0 GiB in int4, but 0\.0 GiB are free"):
        moescope.load(folder, quantize="int4")


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a file; name a \.gguf file or the folder"):
        moescope.load(folder / "config.json")


def test_a_hub_name_that_cannot_be_reached_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        moescope.load("no-such-org/no-such-model")


def test_ids_that_the_model_lacks_are_a_sentence(model: Model) -> None:
    with pytest.raises(UserError, match="ids run from 0 to 299"):
        model.logits(torch.tensor([[0, 300]]))
    with pytest.raises(UserError, match=r"must be \(batch, seq\)"):
        model.logits(torch.tensor([0, 3]))


def test_importing_moescope_imports_nothing_heavy() -> None:
    script = "import moescope, sys, json; print(json.dumps([m for m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "tokenizers", "pydantic"} & set(json.loads(done.stdout))


def test_every_public_name_is_there() -> None:
    for name in moescope.__all__:
        assert getattr(moescope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = moescope.Modle


def test_steering_adds_up_and_shares_the_weights(model: Model, tmp_path: Path) -> None:
    steered = model.steer(disabled={(1, 3)}).steer(num_experts_per_tok=1)
    assert steered.steering.disabled == {(1, 3)} and steered.steering.num_experts_per_tok == 1
    assert steered.network.lm_head.weight is model.network.lm_head.weight
    back = steered.steer(disabled=(), num_experts_per_tok=None)
    assert back.network is model.network
    with pytest.raises(UserError, match="there is no steering field 'top_k'; choose from num_ex"):
        model.steer(top_k=3)
    with pytest.raises(UserError, match="a checkpoint cannot hold steering"):
        steered.save(tmp_path)


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"backend": "cpu"}])
def test_native_kernels_do_not_compute_on_a_gpu(options: dict[str, str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="compute on the CPU, and device is 'cuda'"):
        moescope.load("tiny", device="cuda", **options)


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU here; leave it out or say cpu"):
        moescope.load("tiny", device="cuda")
