"""Our quantiser emits ggml's blocks, which gguf reads, and errs no more than ggml's own does."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moescope.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the extension is not built")
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K"]
SEEDS = st.integers(0, 1000)


def through(weight: Tensor, block_type: str) -> Tensor:
    """What gguf reads from the blocks that we made of `(rows, columns)`."""
    kind = GGMLQuantizationType[block_type]
    return torch.from_numpy(gguf.quants.dequantize(cpu.quantize_blocks(weight, block_type), kind))


def error(rounded: Tensor, weight: Tensor) -> float:
    """The relative error that the search makes small: large weights count more."""
    importance = weight.abs() + weight.square().mean(dim=-1, keepdim=True).sqrt()
    missed = (importance * (rounded - weight).square()).sum()
    return float((missed / (importance * weight.square()).sum()).sqrt())


def random_weight(seed: int, rows: int, columns: int, tails: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    spread = torch.rand(rows, columns, generator=generator).clamp(min=0.01).pow(-tails)
    return 0.03 * normal * spread


@pytest.mark.parametrize("block_type", TYPES)
@given(seed=SEEDS, rows=st.integers(1, 9), blocks=st.integers(1, 3), tails=st.floats(0, 0.4))
@settings(max_examples=15)
def test_errors_are_within_half_a_step(
    block_type: str, seed: int, rows: int, blocks: int, tails: float
) -> None:
    columns = blocks * gguf.GGML_QUANT_SIZES[GGMLQuantizationType[block_type]][0]
    weight = random_weight(seed, rows, columns, tails)
    bits = 4 if "4" in block_type else int(block_type[1])
    steps = 2 ** (bits - 1)
    assert error(through(weight, block_type), weight) < 1.1 / steps


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("tails", [0.0, 0.3])
def test_errors_are_no_larger_than_ggmls(block_type: str, tails: float) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    found = list(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base*"))
    if not found:
        pytest.skip("ggml's library is elsewhere in this build of llama-cpp-python")
    ggml = ctypes.CDLL(str(found[0]))
    weight = random_weight(1, 64, 1024, tails)
    kind = GGMLQuantizationType[block_type]
    theirs = np.empty_like(cpu.quantize_blocks(weight, block_type))
    ggml.ggml_quantize_chunk(
        ctypes.c_int(int(kind)),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(theirs.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(len(weight)),
        ctypes.c_int64(weight.shape[1]),
        None,
    )
    ggmls = torch.from_numpy(gguf.quants.dequantize(theirs, kind))
    assert error(through(weight, block_type), weight) <= 1.005 * error(ggmls, weight)


@pytest.mark.parametrize("block_type", TYPES)
def test_what_a_block_holds_exactly_stays(block_type: str) -> None:
    constant = torch.full((2, 512), 0.5)
    zeros = torch.zeros(1, 512)
    assert torch.equal(through(zeros, block_type), zeros)
    torch.testing.assert_close(through(constant, block_type), constant, rtol=0.04, atol=0)


@given(seed=SEEDS, rows=st.integers(1, 9), blocks=st.integers(1, 9))
def test_what_was_in_mxfp4_stays(seed: int, rows: int, blocks: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (rows, 17 * blocks), np.uint8)
    packed[:, ::17] = packed[:, ::17] % 60 + 100  # exponents that float32 has room for
    weight = torch.from_numpy(gguf.quants.dequantize(packed, GGMLQuantizationType.MXFP4))
    assert torch.equal(through(weight, "MXFP4"), weight)


@pytest.mark.parametrize("block_type", TYPES)
def test_numbers_out_of_range_do_no_harm(block_type: str) -> None:
    weight = random_weight(2, 3, 512, 0.0)
    before = cpu.quantize_blocks(weight, block_type)
    weight[1, 7], weight[1, 300] = torch.inf, torch.nan
    after = cpu.quantize_blocks(weight, block_type)
    assert np.array_equal(before[[0, 2]], after[[0, 2]])


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        cpu.quantize_blocks(torch.zeros(2, 96), "Q4_K")
    with pytest.raises(ValueError, match="Q3_K"):
        cpu.quantize_blocks(torch.zeros(2, 256), "Q3_K")
