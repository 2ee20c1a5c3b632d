"""Native experts with biases, clamps and gpt-oss's activation equal loops and transformers."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packing import expert_weights
from torch import Tensor
from transformers import DeepseekV4Config, GptOssConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moescope.kernels import cpu
from moescope.model.routing import UNUSED

pytestmark = pytest.mark.skipif(not cpu.available(), reason="test_cpu.py says why this is fine")

SETS = cpu.instruction_sets() or ["none"]
pack = partial(cpu.pack, weight_format="bf16")  # its products take activations as they are


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = cpu.instruction_set()
    assert before is not None
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


def held(*shape: int, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """Normal numbers that bf16 holds exactly."""
    drawn = torch.randn(shape, generator=generator) * size / shape[-1] ** 0.5
    return drawn.bfloat16().float()


def activated(gate: Tensor, up: Tensor, act: str, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if act == "swigluoai":
        return (up + 1) * gate / (1 + (-1.702 * gate).exp())
    return gate / (1 + (-gate).exp()) * up


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tokens=st.one_of(st.integers(1, 9), st.integers(90, 110)),
    experts=st.integers(1, 7),
    slots=st.integers(1, 4),
    hidden=st.integers(1, 140),
    intermediate=st.integers(1, 140),
    shared=st.booleans(),
    biased=st.booleans(),
    act=st.sampled_from(["silu", "swigluoai"]),
    limit=st.sampled_from([None, 0.6, 7.0]),
    unused=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 100),
)
def test_switched_mixtures_equal_plain_loops(
    isa: str,
    tokens: int,
    experts: int,
    slots: int,
    hidden: int,
    intermediate: int,
    shared: bool,
    biased: bool,
    act: str,
    limit: float | None,
    unused: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(held, generator=generator)

    def matrices(count: int) -> list[Tensor]:
        up = [draw(count, intermediate, hidden, size=3) for _ in range(2)]
        return [*up, draw(count, hidden, intermediate)]

    routed, beside = matrices(experts), matrices(1) if shared else None
    biases = None
    if biased:
        widths = (intermediate, intermediate, hidden)
        biases = tuple(torch.randn(experts, width, generator=generator) for width in widths)
    layer = cpu.feed_forward_layer(
        expert_weights(*routed, pack),
        None if beside is None else expert_weights(*beside, pack),
        biases=biases,
        act=act,
        limit=limit,
        shared_limit=1.0,
    )
    x = torch.randn(tokens, hidden, generator=generator)
    topk_ids = torch.randint(experts, (tokens, slots), generator=generator)
    topk_ids[torch.rand(tokens, slots, generator=generator) < unused] = UNUSED
    topk_weights = torch.rand(tokens, slots, generator=generator)
    found = cpu.feed_forward(layer, x, topk_ids, topk_weights)

    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        row = x[token].double()
        visits = list(zip(topk_ids[token].tolist(), topk_weights[token].double(), strict=True))
        for expert, weight in visits:
            if expert == UNUSED:
                continue
            gate, up, down = (matrix[expert].double() for matrix in routed)
            added = [bias[expert].double() for bias in biases] if biases else [0, 0, 0]
            middle = activated(gate @ row + added[0], up @ row + added[1], act, limit)
            exact[token] += weight * (down @ middle + added[2])
        if beside is not None:
            gate, up, down = (matrix[0].double() for matrix in beside)
            exact[token] += down @ activated(gate @ row, up @ row, "silu", 1.0)
    torch.testing.assert_close(
        found.double(), exact, rtol=1e-4, atol=2e-5 * float(exact.abs().max()) + 1e-7
    )


def test_experts_of_gpt_oss_equal_transformers(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = GptOssConfig(hidden_size=72, intermediate_size=40, num_local_experts=6)
    theirs = GptOssExperts(config).eval()
    for parameter in theirs.parameters():
        parameter.data = held(*parameter.shape, generator=generator, size=8)
    gate_up, down = theirs.gate_up_proj.detach().mT, theirs.down_proj.detach().mT
    gate_up_bias, down_bias = theirs.gate_up_proj_bias.detach(), theirs.down_proj_bias.detach()
    layer = cpu.feed_forward_layer(
        expert_weights(
            gate_up[:, ::2].contiguous(), gate_up[:, 1::2].contiguous(), down.contiguous(), pack
        ),
        None,
        biases=(gate_up_bias[:, ::2], gate_up_bias[:, 1::2], down_bias),
        act="swigluoai",
        limit=config.swiglu_limit,
    )
    x = torch.randn(30, 72, generator=generator)
    topk_ids = torch.rand(30, 6, generator=generator).topk(4).indices
    topk_weights = torch.rand(30, 4, generator=generator)
    with torch.inference_mode():
        expected = theirs(x, topk_ids, topk_weights)
    found = cpu.feed_forward(layer, x, topk_ids, topk_weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert expected.abs().max() > 10, "so large that the clamp matters"


def test_clamped_experts_equal_transformers(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = DeepseekV4Config(
        hidden_size=72, moe_intermediate_size=40, n_routed_experts=6, swiglu_limit=1.0
    )
    theirs = DeepseekV4Experts(config).eval()
    for parameter in theirs.parameters():
        parameter.data = held(*parameter.shape, generator=generator, size=4)
    gate, up = theirs.gate_up_proj.detach().chunk(2, dim=1)
    weights = expert_weights(gate, up, theirs.down_proj.detach(), pack)
    layer = cpu.feed_forward_layer(weights, None, limit=1.0)
    x = torch.randn(30, 72, generator=generator)
    topk_ids = torch.rand(30, theirs.num_experts, generator=generator).topk(2).indices
    topk_weights = torch.rand(30, 2, generator=generator)
    with torch.inference_mode():
        expected = theirs(x, topk_ids, topk_weights)
    found = cpu.feed_forward(layer, x, topk_ids, topk_weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_biases_of_another_shape_are_refused() -> None:
    weights = expert_weights(torch.ones(2, 8, 16), torch.ones(2, 8, 16), torch.ones(2, 16, 8), pack)
    with pytest.raises(ValueError, match="biases do not fit"):
        cpu.feed_forward_layer(
            weights, None, biases=(torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8))
        )
