"""Fast paths equal the reference, forward and backward, over odd shapes and in both types."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moescope import kernels
from moescope.kernels import reference
from moescope.kernels.quantize import dequantize_int8, quantize_int8
from moescope.model.routing import UNUSED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEEDS = st.integers(0, 1000)


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agree(
    fast: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    bf16_bound: float = 2e-2,
) -> None:
    """Compare results and the gradients of every input, the truth being computed in float64."""
    ours = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    result, expected = fast(*ours), truth(*exact)
    assert result.dtype == dtype or result.ndim == 0
    upstream = (torch.rand(result.shape, generator=chance(99)) + 0.5).to(result.dtype)
    result.backward(upstream)
    expected.backward(upstream.to(expected.dtype))
    bound = 1e-5 if dtype == torch.float32 else bf16_bound
    pairs = [(result, expected)] + [(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
    for got, wanted in pairs:
        assert got is not None and wanted is not None
        largest = wanted.detach().abs().max().clamp(min=1.0)  # terms of size one may cancel
        assert float((got.detach().double() - wanted.detach()).abs().max() / largest) < bound


def alone(*inputs: Tensor) -> Tensor:
    """What is computed on a GPU, with nothing but plain experts."""
    return kernels.grouped_experts(*inputs, activation=kernels.Activation())


@pytest.mark.parametrize("kernel", [kernels.routed_experts, alone])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 9),
    slots=st.integers(1, 4),
    hidden=st.one_of(st.integers(1, 19), st.just(24)),
    intermediate=st.one_of(st.integers(1, 13), st.just(16)),
    unused=st.floats(0, 1),
    seed=SEEDS,
)
def test_routed_experts_equal_a_loop_over_experts(
    kernel: Callable[..., Tensor],
    dtype: str,
    tokens: int,
    experts: int,
    slots: int,
    hidden: int,
    intermediate: int,
    unused: float,
    seed: int,
) -> None:
    generator = chance(seed)
    topk_ids = torch.randint(experts, (tokens, slots), generator=generator)
    topk_ids[torch.rand(tokens, slots, generator=generator) < unused] = UNUSED
    inputs = [
        torch.randn(shape, generator=generator)
        for shape in (
            (tokens, hidden),
            (experts, 2 * intermediate, hidden),
            (experts, hidden, intermediate),
        )
    ]
    weights = torch.rand(tokens, slots, generator=generator)

    def with_ids(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, up, down, w: kernel(x, up, down, topk_ids, w)

    agree(
        with_ids(kernel),
        with_ids(reference.routed_experts),
        [*inputs, weights],
        DTYPES[dtype],
        bf16_bound=6e-2,  # three roundings one after another
    )


@pytest.mark.parametrize("kind", ["silu", "swigluoai"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_grouped_experts_equal_experts_one_after_another(kind: str, limit: float | None) -> None:
    generator = chance(1)
    topk_ids = torch.randint(-1, 5, (33, 3), generator=generator)
    shapes = ((33, 8), (5, 24, 8), (5, 8, 12), (33, 3), (5, 24), (5, 8))

    def with_biases(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        activation = kernels.Activation(kind, limit)  # pyright: ignore[reportArgumentType]
        return lambda x, up, down, w, first, second: kernel(
            x,
            up,
            down,
            topk_ids,
            w,
            activation=activation,
            gate_up_proj_bias=first,
            down_proj_bias=second,
        )

    agree(
        with_biases(kernels.grouped_experts),
        with_biases(kernels.visited_experts),
        [torch.randn(shape, generator=generator) for shape in shapes],
        torch.float32,
    )


def test_no_token_is_dropped_when_all_choose_one_expert() -> None:
    generator = chance(0)
    hidden_states = torch.randn(300, 8, generator=generator)
    up, down = torch.randn(5, 12, 8, generator=generator), torch.randn(5, 8, 6, generator=generator)
    topk_ids = torch.full((300, 1), 3)
    output = kernels.routed_experts(hidden_states, up, down, topk_ids, torch.ones(300, 1))
    gate, value = (hidden_states @ up[3].T).chunk(2, dim=-1)
    torch.testing.assert_close(output, (F.silu(gate) * value) @ down[3].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    seq=st.one_of(st.integers(1, 20), st.integers(126, 130), st.integers(255, 300)),
    width=st.integers(1, 9),
    value_width=st.integers(1, 9),
    seed=SEEDS,
)
def test_causal_attention_equals_softmax_over_the_past(
    dtype: str, batch: int, heads: int, seq: int, width: int, value_width: int, seed: int
) -> None:
    generator = chance(seed)
    query, key = (torch.randn(batch, heads, seq, width, generator=generator) for _ in range(2))
    value = torch.randn(batch, heads, seq, value_width, generator=generator)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.mT * 0.4
        past = torch.ones(seq, seq, dtype=torch.bool).tril()
        return logits.masked_fill(~past, -torch.inf).softmax(dim=-1) @ value

    agree(
        lambda q, k, v: kernels.causal_attention(q, k, v, 0.4),
        plain,
        [query, key, value],
        DTYPES[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(
    tokens=st.one_of(st.integers(1, 40), st.integers(510, 520), st.integers(1020, 1030)),
    hidden=st.integers(1, 17),
    vocab=st.integers(2, 60),
    seed=SEEDS,
)
def test_the_heads_loss_equals_cross_entropy(
    dtype: str, tokens: int, hidden: int, vocab: int, seed: int
) -> None:
    generator = chance(seed)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    inputs = [torch.randn(tokens, hidden, generator=generator)]
    inputs.append(torch.randn(vocab, hidden, generator=generator))
    agree(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets) * tokens,
        lambda x, w: F.cross_entropy(x @ w.T, targets, reduction="sum"),
        inputs,
        DTYPES[dtype],
    )
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(*inputs, targets)
    expected = reference.linear_cross_entropy(*inputs, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """Forty chunks that pull one way: a sum in bfloat16 would drift by several percent."""
    generator = chance(0)
    hidden_states = (torch.rand(40 * 512, 4, generator=generator) + 0.5).bfloat16()
    weight = torch.randn(6, 4, generator=generator).bfloat16().requires_grad_()
    targets = torch.full((40 * 512,), 2)
    kernels.linear_cross_entropy(hidden_states, weight, targets).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden_states.double() @ exact.T, targets).backward()
    assert weight.grad is not None and exact.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), width=st.integers(1, 40), seed=SEEDS)
def test_swiglu_follows_its_formula(dtype: str, rows: int, width: int, seed: int) -> None:
    inputs = [torch.randn(rows, width, generator=chance(seed + part)) * 3 for part in (0, 1)]
    agree(kernels.swiglu, lambda gate, up: gate / (1 + (-gate).exp()) * up, inputs, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=SEEDS)
def test_rms_norm_follows_its_formula(dtype: str, rows: int, width: int, seed: int) -> None:
    generator = chance(seed)
    states = torch.randn(rows, width, generator=generator) * 3
    weight = torch.rand(width, generator=generator) + 0.5
    agree(
        lambda x, w: kernels.rms_norm(x, w, 1e-3),
        lambda x, w: x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * w,
        [states, weight],
        DTYPES[dtype],
    )


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=SEEDS, size=st.floats(1e-6, 1e6))
def test_int8_rows_are_within_half_a_scale(rows: int, columns: int, seed: int, size: float) -> None:
    weight = torch.randn(rows, columns, generator=chance(seed)) * size
    integers, scale = quantize_int8(weight)
    assert integers.dtype == torch.int8 and scale.shape == (rows, 1)
    restored = dequantize_int8(integers, scale, torch.float32)
    assert bool(((restored - weight).abs() <= scale * 0.5001).all())
    assert integers.abs().amax(dim=-1).tolist() == [127] * rows


def test_a_row_of_zeros_survives_int8() -> None:
    integers, scale = quantize_int8(torch.zeros(2, 3))
    assert not dequantize_int8(integers, scale, torch.float32).any()


@pytest.mark.slow
def test_fused_kernels_equal_the_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled elementwise chains, on the shapes of a small network."""
    generator = chance(0)
    hidden_states = torch.randn(70, 24, generator=generator)
    up, down = (
        torch.randn(4, 32, 24, generator=generator),
        torch.randn(4, 24, 16, generator=generator),
    )
    topk_ids = torch.randint(4, (70, 2), generator=generator)
    weights = torch.rand(70, 2, generator=generator)
    targets = torch.randint(50, (70,), generator=generator)
    head = torch.randn(50, 24, generator=generator)

    def loss_and_gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden_states, up, down, weights, head)]
        x, gate_up, down_proj, topk_weights, lm_head = leaves
        mixed = kernels.routed_experts(x, gate_up, down_proj, topk_ids, topk_weights)
        normed = kernels.rms_norm(x + mixed, torch.ones(24), 1e-6)
        loss = kernels.linear_cross_entropy(normed, lm_head, targets)
        loss.backward()
        return [loss, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    plain = loss_and_gradients()
    if not kernels.enable_fusion():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("moescope.kernels.fusion._enabled", True)
    for fused, unfused in zip(loss_and_gradients(), plain, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
