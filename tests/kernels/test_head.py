"""The norm and the head in one call say what they say one after the other."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packing import packed_copy

from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM, initialise
from moescope.native.head import NativeHead

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the extension is not built")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    hidden=st.integers(1, 40).map(lambda half: 2 * half),
    vocab=st.integers(1, 200),
    rows=st.integers(1, 20),
    weights=st.sampled_from(["bf16", "int8", "int4"]),
    scaling=st.sampled_from([1.0, 8.0, 0.3]),
    tied=st.booleans(),
)
def test_the_head_is_norm_and_map(
    isa: str, hidden: int, vocab: int, rows: int, weights: str, scaling: float, tied: bool
) -> None:
    config = read_config(
        {
            "model_type": "granitemoe",
            "num_key_value_heads": 1,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "logits_scaling": scaling,
            "tie_word_embeddings": tied,
            "initializer_range": 0.3,
        }
    )
    network = CausalLM(config)
    initialise(network, seed=rows)
    torch.nn.init.normal_(network.model.norm.weight)
    packed = packed_copy(network.eval(), weights)
    assert NativeHead.is_native(packed) and not NativeHead.is_native(network)
    states = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(vocab)) * 3
    expected = packed.logits(packed.model.norm(states))
    assert torch.equal(NativeHead(packed)(states), expected)
    spread = states.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(NativeHead(packed)(spread), expected)


def test_what_does_not_fit_the_head_is_refused() -> None:
    weights = cpu.pack(torch.randn(1, 5, 32), "int8")
    with pytest.raises(ValueError, match="do not fit together"):
        cpu.head((torch.ones(31), 1e-6), weights)
    head = cpu.head((torch.ones(32), 1e-6), weights, torch.ones(5))
    for outputs, hidden in ((4, 32), (5, 31)):
        with pytest.raises(ValueError, match="do not fit the head"):
            cpu.run_head(head, outputs, torch.zeros(2, hidden))
