import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hub; some ask a server on this machine

import pytest
import torch
from hypothesis import settings

from moescope.api import Model
from moescope.families import read_config
from moescope.kernels import fusion
from moescope.model.decoder import CausalLM, initialise
from moescope.text.tokenizer import Tokenizer

# Examples are the same in every run, and a slow machine fails none of them.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def fusion_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that fuses, in one test, rounds otherwise in all that follow in the process."""
    monkeypatch.setattr(fusion, "_enabled", False)


@pytest.fixture(scope="session")
def model() -> Model:
    """A DeepSeek-V3 of a few thousand random weights, with its own vocabulary."""
    texts = [f"床前明月光 {n} the moon before my bed, is it frost? 😀\n" * 3 for n in range(200)]
    tokenizer = Tokenizer.train_on_texts(texts, 300, progress=False)
    config = read_config(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "initializer_range": 0.3,
            "max_position_embeddings": 64,
            "eos_token_id": tokenizer.eos_id,
        }
    )
    network = CausalLM(config)
    initialise(network, seed=0)
    return Model("small", network, tokenizer)


PARITY = {
    "parity": (
        "largest relative difference of logits from transformers, float32",
        ("prefill", "decoding", "saved"),
    ),
    "gguf parity": (
        "largest relative difference of logits from llama.cpp, on the same GGUF in F32",
        ("llama.cpp",),
    ),
}
"""Tables that tests fill by `record_property`: title and columns."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far the logits are from those of others."""
    properties = [
        (name, value)
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if report.when == "call"
    ]
    for table, (title, columns) in PARITY.items():
        rows = [value for name, value in properties if name == table]
        if not rows:
            continue
        terminalreporter.section(title)
        terminalreporter.line(f"{'':36}{''.join(f'{column:>12}' for column in columns)}")
        for variant, *differences in sorted(rows):
            cells = (f"{d:>12.1e}" if d is not None else f"{'-':>12}" for d in differences)
            terminalreporter.line(f"{variant:36}{''.join(cells)}")
        if table == "parity":
            terminalreporter.line("`deepseek` is held to a float64 loop: transformers lacks it")
