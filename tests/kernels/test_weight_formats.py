"""Weights in a file's own numbers: the same as gguf's, or torch's FP8, and products with them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, strategies as st
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
from numpy.typing import NDArray
from torch import Tensor

from moescope.kernels import cpu, reference
from moescope.native.weight_format import BLOCK_FORMATS, WEIGHT_FORMATS

KINDS = sorted(BLOCK_FORMATS)
F16_AT = {  # bytes of a block that are f16 scales or minimums, which random bytes would make NaN
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}
GROUP = {"Q6_K": 16}
"""Columns of activations that share a scale, where it is not 32."""


FLOATS = ("F32", "F16", "BF16", "F8_E4M3")


def block_of(kind: str) -> tuple[int, int]:
    """Columns of a block, and its bytes."""
    if kind == "F8_E4M3":
        return 128, 4 + 128
    return gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> NDArray[np.uint8]:
    """Blocks of any bytes, rows after rows, whose scales are numbers of a usual size."""
    chance = np.random.default_rng(seed)
    block, size = block_of(kind)
    if block == 1:
        numbers = chance.standard_normal((rows, columns)).astype(np.float32)
        return quants.quantize(numbers, GGMLQuantizationType[kind]).view(np.uint8).reshape(-1)
    data = chance.integers(0, 256, (rows * -(-columns // block), size), dtype=np.uint8)
    for at in F16_AT.get(kind, ()):
        scales = (chance.standard_normal(len(data)) * 0.01).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        data[:, 0] = chance.integers(115, 125, len(data))
    if kind == "F8_E4M3":
        data[(data & 0x7F) == 0x7F] = 0  # NaN
        scales = (chance.standard_normal(len(data)) * 1e-4).astype(np.float32)
        data[:, :4] = scales[:, None].view(np.uint8)
    return data.reshape(-1)


def dequantized(kind: str, data: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    block, size = block_of(kind)
    rows = data.reshape(-1, -(-shape[-1] // block) * size)
    if kind == "F8_E4M3":
        blocks = torch.from_numpy(rows.reshape(len(rows), -1, size).copy())
        scales = blocks[:, :, :4].contiguous().view(torch.float32)
        codes = blocks[:, :, 4:].contiguous().view(torch.float8_e4m3fn)
        return (codes.float() * scales).flatten(1)[:, : shape[-1]].reshape(shape)
    numbers = quants.dequantize(rows, GGMLQuantizationType[kind])
    return torch.from_numpy(numbers.astype(np.float32).reshape(shape))


def block_columns(kind: str, width: int) -> int:
    """A number of columns that a file may have, `width` or some more."""
    if kind == "F8_E4M3":  # whose last block may be a part
        return width
    block, _ = block_of(kind)
    return -(-width // block) * block


def rounded_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations `(rows, columns)` in int8 with a scale a group of columns, and half a step."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    most = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(most > 0, 127 / most, 0)
    step = (most / 127).double()
    taken = (groups * inverse).round().double() * step
    half = (step / 2).expand_as(taken)
    return taken.flatten(-2)[..., : x.shape[-1]], half.flatten(-2)[..., : x.shape[-1]]


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@examples(12)
@given(matrices=st.integers(1, 3), outputs=WIDTHS, width=WIDTHS, seed=SEEDS)
def test_unpacked_blocks_are_what_gguf_makes_of_them(
    kind: str, matrices: int, outputs: int, width: int, seed: int
) -> None:
    shape = matrices, outputs, block_columns(kind, width)
    data = random_blocks(kind, matrices * outputs, shape[2], seed)
    held = cpu.unpacked(cpu.pack_blocks(data, kind, shape), shape)
    assert torch.equal(held, dequantized(kind, data, shape))


@needs_extension
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_blocks_that_gguf_quantised(kind: str) -> None:
    numbers = torch.randn(40, 320, generator=chance(3))
    numbers[5] = 0
    data = quants.quantize(numbers.numpy(), GGMLQuantizationType[kind]).reshape(-1)
    held = cpu.unpacked(cpu.pack_blocks(data, kind, (1, 40, 320)), (1, 40, 320))
    assert torch.equal(held, dequantized(kind, data, (1, 40, 320)))
    assert float((held[0] - numbers).norm() / numbers.norm()) < 0.2


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_negative_scales(kind: str) -> None:
    shape = 1, 20, 256
    data = random_blocks(kind, 20, 256, 0)
    block, size = block_of(kind)
    if block == 1:
        pytest.skip("numbers have no scales")
    blocks = data.reshape(-1, size)
    for at in F16_AT.get(kind, ()):
        tiny = np.array([0, -0.0, 6e-8, -6e-8, 3e-5, -1, 65504], dtype=np.float16)
        chosen = tiny[np.arange(len(blocks)) % len(tiny)]
        blocks[:, at : at + 2] = chosen.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = np.arange(len(blocks)) % 5
    packed = cpu.pack_blocks(data, kind, shape)
    exact = dequantized(kind, data, shape)
    assert torch.equal(cpu.unpacked(packed, shape), exact)
    ones = torch.full((1, 256), 127.0)
    close(cpu.linear(packed, 20, ones), ones.double() @ exact[0].double().T, 1e-5)


@needs_extension
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_every_scale_of_mxfp4(isa: str, rows: int) -> None:
    """Also the two that are no normal numbers; none so large that integers times it overflow."""
    shape = 1, 240, 32
    data = random_blocks("MXFP4", 240, 32, 0)
    exponents = data.reshape(240, -1)[:, 0]
    exponents[:] = 128
    words = dequantized("MXFP4", data, shape)[0].double()
    exponents[:] = np.arange(240)
    exact = words * 2.0 ** (torch.arange(240, dtype=torch.float64)[:, None] - 128)
    packed = cpu.pack_blocks(data, "MXFP4", shape)
    for which, size in ((slice(128), 2.0**10), (slice(128, None), 2.0**-10)):
        x = torch.full((rows, 32), size)
        found = cpu.linear(packed, 240, x)[:, which].double()
        wanted = x.double() @ exact[which].T
        assert ((found - wanted).abs() <= 1e-6 * x.double() @ exact[which].abs().T).all()


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@examples(10)
@given(
    rows=ROWS,
    outputs=WIDTHS,
    width=WIDTHS,
    seed=SEEDS,
    size=st.floats(1e-4, 1e4),
    biased=st.booleans(),
)
def test_products_are_those_of_rounded_activations(
    isa: str, kind: str, rows: int, outputs: int, width: int, seed: int, size: float, biased: bool
) -> None:
    generator = chance(seed)
    columns = block_columns(kind, width)
    data = random_blocks(kind, outputs, columns, seed)
    packed = cpu.pack_blocks(data, kind, (1, outputs, columns))
    held = dequantized(kind, data, (outputs, columns)).double()
    x = torch.randn(rows, columns, generator=generator) * size
    x[0, : min(columns, 40)] = 0
    bias = torch.randn(outputs, generator=generator) if biased else None
    product = cpu.linear(packed, outputs, x, bias)
    taken, half_step = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    if kind not in FLOATS:
        taken, half_step = rounded_rows(x, GROUP.get(kind, 32))
    exact = taken @ held.T + (0 if bias is None else bias)
    # float32 sums of some hundreds of products, each of which may be as large as this
    room = taken.abs() @ held.abs().T
    assert not product.isnan().any()
    # A rounding that falls on a tie may fall to either side, one step in a million.
    assert float(((product - exact).abs() > 3e-6 * room + 1e-6 * exact.abs()).float().mean()) < 0.01
    unrounded = x.double() @ held.T + (0 if bias is None else bias)
    lost = 1.01 * half_step @ held.abs().T + 3e-6 * room + 1e-6 * exact.abs()
    assert bool(((product - unrounded).abs() <= lost).all())


@needs_extension
@pytest.mark.parametrize("kind", [*KINDS, "int8", "int4", "bf16"])
@examples(6)
@given(rows=st.integers(2, 40), outputs=WIDTHS, width=WIDTHS, seed=SEEDS)
def test_a_row_is_bit_by_bit_what_it_is_alone(
    isa: str, kind: str, rows: int, outputs: int, width: int, seed: int
) -> None:
    if kind in BLOCK_FORMATS:
        columns = block_columns(kind, width)
        data = random_blocks(kind, outputs, columns, seed)
        packed = cpu.pack_blocks(data, kind, (1, outputs, columns))
    else:
        columns = width
        packed = cpu.pack(torch.randn(1, outputs, columns, generator=chance(seed)), kind)
    x = torch.randn(rows, columns, generator=chance(seed + 1))
    together = cpu.linear(packed, outputs, x)
    alone = torch.cat([cpu.linear(packed, outputs, row[None]) for row in x])
    if kind in FLOATS or kind == "bf16":  # sums of several registers are added in another order
        close(together, alone, 1e-5)
    else:
        assert torch.equal(together, alone)


@needs_extension
@examples(25)
@given(
    kinds=st.lists(st.sampled_from([*KINDS, "int8", "int4"]), min_size=6, max_size=6),
    tokens=ROWS,
    experts=st.integers(1, 4),
    blocks=st.integers(1, 2),
    seed=SEEDS,
)
def test_experts_mix_formats(
    isa: str, kinds: list[str], tokens: int, experts: int, blocks: int, seed: int
) -> None:
    generator = chance(seed)
    hidden, intermediate = 256, 256 * blocks

    def matrix(kind: str, count: int, outputs: int, columns: int) -> "tuple[cpu.Weights, Tensor]":
        shape = count, outputs, columns
        if kind in BLOCK_FORMATS:
            packed = cpu.pack_blocks(
                random_blocks(kind, count * outputs, columns, seed), kind, shape
            )
        else:
            packed = cpu.pack(torch.randn(shape, generator=generator), kind)
        return packed, cpu.unpacked(packed, shape).double()

    gate, up, down, shared_gate, shared_up, shared_down = (
        matrix(
            kind,
            experts if place < 3 else 1,
            *((hidden, intermediate) if place % 3 == 2 else (intermediate, hidden)),
        )
        for place, kind in enumerate(kinds)
    )
    layer = cpu.feed_forward_layer(
        (gate[0], up[0], down[0]), (shared_gate[0], shared_up[0], shared_down[0])
    )
    x = whole_numbers(tokens, hidden, generator)
    x[:, ::16] = 127  # so that every format's groups hold it exactly
    x /= 64 * hidden
    topk_ids = torch.randint(experts, (tokens, 2), generator=generator)
    topk_weights = torch.rand(tokens, 2, generator=generator)
    output = cpu.feed_forward(layer, x, topk_ids, topk_weights)
    exact = reference.routed_experts(
        x.double(), torch.cat([gate[1], up[1]], dim=1), down[1], topk_ids, topk_weights.double()
    )
    exact += reference.swiglu(x.double() @ shared_gate[1][0].T, x.double() @ shared_up[1][0].T) @ (
        shared_down[1][0].T
    )
    room = half_steps(x, shared_gate[1][0], shared_up[1][0], shared_down[1][0])
    for expert in range(experts):
        weight = (topk_weights * (topk_ids == expert)).sum(dim=1, keepdim=True)
        room += weight * half_steps(x, gate[1][expert], up[1][expert], down[1][expert])
    assert bool(((output - exact).abs() <= 1.01 * room + 1e-4 * exact.abs().max() + 1e-6).all())
    assert float((output - exact).norm()) <= 0.5 * float(room.norm()) + 1e-5


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_close_to_the_files(kind: str) -> None:
    shape = 2, 64, 512
    data = random_blocks(kind, 128, 512, 0)
    packed = cpu.pack_blocks(data, kind, shape)
    assert packed.matrix_bytes * 2 <= len(data) * 1.04
    bits = WEIGHT_FORMATS[BLOCK_FORMATS[kind]].bits_per_weight
    assert packed.matrix_bytes * 8 == bits * 64 * 512


@needs_extension
def test_blocks_that_do_not_fit_are_refused() -> None:
    data = random_blocks("Q4_K", 3, 256, 0)
    with pytest.raises(ValueError, match="not of this size"):
        cpu.pack_blocks(data, "Q4_K", (1, 2, 256))
    with pytest.raises(ValueError, match="not of this size"):
        cpu.pack_blocks(data, "Q4_K", (1, 3, 128))
    with pytest.raises(ValueError, match="Q9_K are not known"):
        cpu.pack_blocks(data, "Q9_K", (1, 3, 256))
    with pytest.raises(ValueError, match="made of blocks only"):
        cpu.pack(torch.ones(2, 256), "q4_k")
