"""What can be told of a GPU without one: nothing in a layer waits for the host.

Tensors of the meta device have no numbers, so whatever asks for one fails.
"""

import pytest
import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.families import read_config
from moescope.machine import choose_device
from moescope.model import decoder
from moescope.model.routing import UNUSED

FIELDS = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topk_method": "greedy", "scoring_func": "softmax"},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2},
        {"topk_method": "sinkhorn"},
    ],
    ids=lambda changes: changes.get("topk_method", "default"),
)
def test_a_training_pass_asks_no_number_of_the_device(changes: dict[str, object]) -> None:
    network = decoder.without_numbers(read_config({**FIELDS, **changes}))
    network.to(torch.bfloat16).model.rotary_emb.to("meta")
    ids = torch.zeros(2, 24, dtype=torch.int64, device="meta")
    hidden_states = network(ids)
    network.logits(hidden_states).sum().backward()
    assert hidden_states.shape == (2, 24, 32)
    experts = network.model.layers[1].mlp.experts
    assert experts.gate_up_proj.grad.shape == experts.gate_up_proj.shape


def test_rows_without_an_expert_count_for_nothing() -> None:
    """Products leave such rows as memory was; here it was no number."""
    from moescope import kernels

    original, garbage = torch.nn.functional.grouped_mm, float("nan")

    def leaves_garbage(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        out = original(rows, matrices, offs=offs)
        behind = torch.arange(len(rows))[:, None] >= offs[-1]
        return torch.where(behind, garbage, out)

    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 8), (3, 8, 8), (3, 8, 4), (6, 2))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    states, up, down, weights = inputs
    ids = torch.tensor([[0, 1], [UNUSED, 2], [1, UNUSED], [UNUSED] * 2, [2, 0], [0, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", leaves_garbage)
        plain = kernels.Activation()
        out = kernels.grouped_experts(states, up, down, ids, weights, activation=plain)
        out.sum().backward()
    assert out.isfinite().all() and not out[3].any()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
    assert not states.grad[3].any()


# --- which device --------------------------------------------------------------------------------


def test_a_process_takes_the_gpu_of_its_number_on_the_node(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="there is no cuda:4: PyTorch finds 4 GPUs"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cuda", "finds no GPU here; leave it out or say cpu"),
        ("cuda:1", "finds no GPU here"),
        ("gpu", "device is 'gpu'; choose from cpu, cuda and cuda:N"),
        ("cuda:x", "choose from cpu, cuda and cuda:N"),
        ("cpu:0", "choose from cpu, cuda and cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(name: str, sentence: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(UserError, match=sentence):
        choose_device(name)
