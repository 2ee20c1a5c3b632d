"""The native kernels equal the reference, on every instruction set that this machine runs."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from native_kernels import (
    ROWS,
    SEEDS,
    WIDTHS,
    chance,
    close,
    examples,
    half_steps,
    needs_extension,
    whole_numbers,
)
from packing import Pack, expert_weights
from torch import Tensor

from moescope.errors import UserError
from moescope.kernels import cpu, reference
from moescope.kernels.quantize import dequantize_int8, quantize_int8, rounded
from moescope.model.routing import UNUSED

BUILT = cpu.available()
SETS = cpu.instruction_sets() or ["none"]


def test_the_extension_is_there_wherever_it_can_be_built() -> None:
    assert BUILT or shutil.which("g++") is None, "run `python csrc/build.py`"


def packer(weight_format: str) -> Pack:
    return partial(cpu.pack, weight_format=weight_format)


@needs_extension
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(outputs=WIDTHS, columns=WIDTHS, seed=SEEDS, size=st.floats(1e-6, 1e6))
def test_packed_weights_are_those_that_quantize_makes(
    weight_format: str, dtype: torch.dtype, outputs: int, columns: int, seed: int, size: float
) -> None:
    weight = (torch.randn(3, outputs, columns, generator=chance(seed)) * size).to(dtype)
    held = cpu.unpacked(cpu.pack(weight, weight_format), tuple(weight.shape))
    exact = rounded(weight.float(), weight_format)
    # Ties, and candidates that are equally good (all are for a single column), fall either way.
    errors = [float((guess - weight.float()).norm()) for guess in (held, exact)]
    assert errors[0] <= errors[1] * 1.001 + 0.004 * float(weight.float().norm())
    if columns < 64:
        return
    if weight_format == "int4":  # where the group that sets a row's unit has a tie, all of it moves
        rows = [(guess - weight.float()).norm(dim=-1) for guess in (held, exact)]
        assert bool((rows[0] <= 1.15 * rows[1] + 0.01 * weight.float().norm(dim=-1)).all())
    else:
        assert float(torch.isclose(held, exact, rtol=1e-3, atol=1e-30).float().mean()) > 0.98


@needs_extension
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@examples(15)
@given(rows=ROWS, outputs=WIDTHS, columns=WIDTHS, seed=SEEDS, biased=st.booleans())
def test_linear_is_exact_where_activations_are(
    isa: str, weight_format: str, rows: int, outputs: int, columns: int, seed: int, biased: bool
) -> None:
    generator = chance(seed)
    weight = torch.randn(outputs, columns, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    packed = cpu.pack(weight, weight_format)
    held = cpu.unpacked(packed, (1, outputs, columns))[0].double()
    x = whole_numbers(rows, columns, generator)
    exact = x.double() @ held.T + (0 if bias is None else bias)
    close(cpu.linear(packed, outputs, x, bias), exact, 1e-5)


@needs_extension
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@examples(8)
@given(rows=ROWS, outputs=WIDTHS, columns=WIDTHS, seed=SEEDS, size=st.floats(1e-6, 1e6))
def test_rounding_activations_costs_under_a_percent(
    isa: str, weight_format: str, rows: int, outputs: int, columns: int, seed: int, size: float
) -> None:
    generator = chance(seed)
    packed = cpu.pack(torch.randn(outputs, columns, generator=generator), weight_format)
    held = cpu.unpacked(packed, (1, outputs, columns))[0]
    x = torch.randn(rows, columns, generator=generator) * size
    bound = 0.01 if outputs * rows * columns > 64 else 0.1  # a single product may be unlucky
    close(cpu.linear(packed, outputs, x) / size, (x.double() / size) @ held.double().T, bound)


@needs_extension
@examples(10)
@given(seed=SEEDS)
def test_extreme_activations_stay_in_their_group(isa: str, seed: int) -> None:
    """One massive activation costs its neighbours precision, and nobody else."""
    generator = chance(seed)
    packed = cpu.pack(torch.randn(48, 256, generator=generator), "int8")
    x = torch.randn(4, 256, generator=generator)
    x[:, 7] = 1e4
    held = cpu.unpacked(packed, (1, 48, 256))[0].clone()
    held[:, 7] = 0
    exact = x.double() @ held.double().T
    product = cpu.linear(packed, 48, x).double()
    product -= x[:, 7:8].double() * cpu.unpacked(packed, (1, 48, 256))[0][:, 7].double()
    error = (product - exact).norm() / exact.norm()
    assert float(error) < 0.7  # all of the 64 neighbours lost is a half


@needs_extension
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@examples(40)
@given(
    tokens=ROWS,
    experts=st.integers(1, 9),
    slots=st.integers(1, 4),
    hidden=WIDTHS,
    intermediate=st.integers(1, 140),
    shared=st.integers(0, 70),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    seed=SEEDS,
)
def test_the_mixture_equals_the_reference(
    isa: str,
    weight_format: str,
    tokens: int,
    experts: int,
    slots: int,
    hidden: int,
    intermediate: int,
    shared: int,
    unused: float,
    seed: int,
) -> None:
    generator = chance(seed)

    def matrices(count: int, width: int) -> list[Tensor]:
        up = torch.randn(2, count, width, hidden, generator=generator) / hidden**0.5
        down = torch.randn(count, hidden, width, generator=generator) / width**0.5
        return [*up, down]

    def held(packed: "tuple[cpu.Weights, ...]", like: list[Tensor]) -> list[Tensor]:
        return [
            cpu.unpacked(weights, tuple(matrix.shape)).double()
            for weights, matrix in zip(packed, like, strict=True)
        ]

    routed = matrices(experts, intermediate)
    packed = expert_weights(*routed, packer(weight_format))
    topk_ids = torch.randint(experts, (tokens, slots), generator=generator)
    topk_ids[torch.rand(tokens, slots, generator=generator) < unused] = UNUSED
    topk_weights = torch.rand(tokens, slots, generator=generator)
    x = whole_numbers(tokens, hidden, generator) / 64  # so that only what goes down is rounded

    gate, up, down = held(packed, routed)
    exact = reference.routed_experts(
        x.double(), torch.cat([gate, up], dim=1), down, topk_ids, topk_weights.double()
    )
    room = torch.zeros_like(exact)  # what rounding each activation by half a step can cost
    for expert in range(experts):
        weight = (topk_weights * (topk_ids == expert)).sum(dim=1, keepdim=True)  # (tokens, 1)
        room += weight * half_steps(x, gate[expert], up[expert], down[expert])
    packed_shared = None
    if shared:
        shared_matrices = matrices(1, shared)
        packed_shared = expert_weights(*shared_matrices, packer(weight_format))
        gate, up, down = held(packed_shared, shared_matrices)
        exact += reference.swiglu(x.double() @ gate[0].T, x.double() @ up[0].T) @ down[0].T
        room += half_steps(x, gate[0], up[0], down[0])
    layer = cpu.feed_forward_layer(packed, packed_shared)
    before = cpu.weight_bytes_read()
    output = cpu.feed_forward(layer, x, topk_ids, topk_weights)
    read = cpu.weight_bytes_read() - before
    assert output.shape == exact.shape and not output.isnan().any()
    assert bool(((output - exact).abs() <= 1.01 * room + 1e-4 * exact.abs().max() + 1e-6).all())
    # Errors have either sign; even one alone, spread evenly, has 1/sqrt(3) of its room.
    if exact.unique().numel() > 64:
        assert float((output - exact).norm()) <= 0.6 * float(room.norm()) + 1e-5

    visited = len(set(topk_ids.flatten().tolist()) - {UNUSED})
    expected = visited * sum(weights.matrix_bytes for weights in packed)
    expected += sum(weights.matrix_bytes for weights in packed_shared or ())
    assert read == expected, "only the experts that somebody visits are read"


@needs_extension
@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@examples(10)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 9),
    slots=st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(120, 200)),
    nope=st.integers(1, 70),
    rope=st.integers(1, 20),
    rank=st.integers(1, 100),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_absorbed_attention_equals_softmax_over_expanded_keys(
    isa: str,
    weight_format: str,
    batch: int,
    heads: int,
    slots: int,
    nope: int,
    rope: int,
    rank: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = chance(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kv_b_proj = normal(heads, nope + width, rank) / rank**0.5
    q_nope, q_rope = normal(batch, heads, nope), normal(batch, heads, rope)
    latents = normal(batch, slots + 3, rank).to(dtype)[:, :slots]  # a view into a longer cache
    k_rope = normal(batch, slots + 3, rope).to(dtype)[:, :slots]
    lengths = torch.randint(1, slots + 1, (batch,), generator=generator)
    scale = (nope + rope) ** -0.5
    pack = packer(weight_format)
    halves = kv_b_proj[:, :nope].mT.contiguous(), kv_b_proj[:, nope:].contiguous()
    packed = cpu.absorbed_attention(*map(pack, halves), scale)
    output = cpu.attend_absorbed(packed, q_nope, q_rope, latents, k_rope, lengths, width)

    up_key = rounded(kv_b_proj[:, :nope].mT.contiguous(), weight_format).mT.double()
    up_value = rounded(kv_b_proj[:, nope:].contiguous(), weight_format).double()
    keys = torch.einsum("bsr,hnr->bhsn", latents.double(), up_key)
    values = torch.einsum("bsr,hvr->bhsv", latents.double(), up_value)
    logits = torch.einsum("bhn,bhsn->bhs", q_nope.double(), keys)
    logits = (logits + torch.einsum("bhr,bsr->bhs", q_rope.double(), k_rope.double())) * scale
    unseen = torch.arange(slots) >= lengths[:, None, None]
    probabilities = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1)
    exact = torch.einsum("bhs,bhsv->bhv", probabilities, values)
    close(output, exact, 0.06 if batch * heads * width > 100 else 0.3)


@needs_extension
@examples(10)
@given(rows=st.integers(1, 9), width=WIDTHS, seed=SEEDS)
def test_rms_norm_equals_the_reference(isa: str, rows: int, width: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=chance(seed)) * 3
    weight = torch.rand(width, generator=chance(seed + 1)) + 0.5
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight
    close(cpu.rms_norm(x, weight, 1e-3), exact, 1e-6)


@needs_extension
@pytest.mark.parametrize("width", [5, 8, 40])
def test_what_is_no_number_stays_none(isa: str, width: int) -> None:
    """Exponentials bound their argument, which must not hide that it is no number."""
    x = torch.randn(2, width, generator=chance(0))
    x[1, width // 2] = torch.nan
    assert cpu.log_sums(x).isnan().tolist() == [False, True]
    one = cpu.pack(torch.eye(width), "bf16")
    layer = cpu.feed_forward_layer(None, (one, one, one))
    assert cpu.feed_forward(layer, x).isnan().any(dim=1).tolist() == [False, True]
    rule = cpu.router(torch.eye(width), top_k=1, scoring="softmax", normalise=False, factor=1.0)
    assert cpu.route(rule, x, 1)[1].isnan().flatten().tolist() == [False, True]


@needs_extension
def test_zeros_and_infinities_are_no_trouble(isa: str) -> None:
    for weight_format in ("int8", "int4"):
        nothing = cpu.pack(torch.zeros(20, 40), weight_format)
        assert not cpu.linear(nothing, 20, torch.ones(2, 40)).any()
        packed = cpu.pack(torch.ones(20, 40), weight_format)
        assert not cpu.linear(packed, 20, torch.zeros(2, 40)).any()
        x = torch.ones(2, 40)
        x[0, 3] = torch.inf
        assert cpu.linear(packed, 20, x)[1].isfinite().all(), "rows do not touch each other"


@needs_extension
def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = cpu.pack(torch.randn(20, 40), "int8")
    with pytest.raises(ValueError, match="do not fit"):
        cpu.linear(packed, 20, torch.ones(2, 41))
    with pytest.raises(ValueError, match="one of int8, int4, bf16"):
        cpu.pack(torch.ones(2, 2), "int3")
    weights = expert_weights(
        torch.ones(2, 8, 16), torch.ones(2, 8, 16), torch.ones(2, 16, 9), packer("int8")
    )
    with pytest.raises(ValueError, match="do not fit together"):
        cpu.feed_forward_layer(weights, None)
    weights = expert_weights(
        torch.ones(2, 8, 16), torch.ones(2, 8, 16), torch.ones(2, 16, 8), packer("int8")
    )
    layer = cpu.feed_forward_layer(weights, None)
    with pytest.raises(ValueError, match="no such expert"):
        cpu.feed_forward(layer, torch.ones(1, 16), torch.tensor([[2]]), torch.ones(1, 1))


@needs_extension
def test_any_number_of_threads_computes_the_same() -> None:
    generator = chance(0)
    packed = cpu.pack(torch.randn(700, 300, generator=generator), "int8")
    x = torch.randn(130, 300, generator=generator)
    before = cpu.threads()
    try:
        results: list[Tensor] = []
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            assert cpu.threads() == threads
            results += [cpu.linear(packed, 700, x) for _ in range(20)]
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        cpu.set_threads(before)


@needs_extension
def test_callers_from_several_threads_take_turns() -> None:
    generator = chance(0)
    packed = cpu.pack(torch.randn(200, 100, generator=generator), "int8")
    inputs = [torch.randn(rows, 100, generator=generator) for rows in (1, 3, 40, 100)]
    expected = [cpu.linear(packed, 200, x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not torch.equal(cpu.linear(packed, 200, inputs[index]), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@needs_extension
@pytest.mark.parametrize("name", SETS)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    program = "from moescope.kernels import cpu; print(cpu.instruction_set())"
    environment = {**os.environ, "MOESCOPE_ISA": name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == name


@needs_extension
def test_an_unknown_instruction_set_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"MOESCOPE_ISA is 'mmx'; this processor runs .*portable"):
        cpu.use_instruction_set("mmx")


@given(rows=st.integers(1, 5), columns=st.integers(1, 80), seed=SEEDS)
def test_int4_groups_err_by_half_a_step_at_most(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=chance(seed))
    error = (rounded(weight, "int4") - weight).abs()
    assert float(error.max()) <= float(weight.abs().max()) / 6.6 + 1e-6
    plain = dequantize_int8(*quantize_int8(weight), torch.float32)
    assert torch.equal(rounded(weight, "int8"), plain)


def test_the_search_beats_plain_rounding_in_int4() -> None:
    weight = torch.randn(64, 320, generator=chance(0))
    groups = weight.unflatten(-1, (-1, 32))
    step = groups.abs().amax(dim=-1, keepdim=True) / 7
    plain = ((groups / step).round() * step).flatten(-2)
    searched = rounded(weight, "int4")
    assert float((searched - weight).norm()) < 0.93 * float((plain - weight).norm())
