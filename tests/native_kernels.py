"""What the tests of the native kernels share."""

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from torch import Tensor

from moescope.kernels import cpu, reference

SEEDS = st.integers(0, 1000)
WIDTHS = st.one_of(st.integers(1, 40), st.integers(60, 70), st.integers(250, 300))
ROWS = st.one_of(st.integers(1, 9), st.integers(90, 200))

needs_extension = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)


def examples(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_numbers(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Activations that int8 holds exactly: each group of 32 has 127 as its largest magnitude."""
    x = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    x[:, ::32] = 127
    return x


def close(ours: Tensor, exact: Tensor, bound: float) -> None:
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    assert not ours.isnan().any()
    scale = exact.double().norm() / exact.numel() ** 0.5
    error = (ours.double() - exact.double()).norm() / exact.numel() ** 0.5
    assert float(error) <= bound * float(scale) + 1e-6


def half_steps(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Most that an output `(tokens, hidden)` moves if each activation is rounded to 1 / 127."""
    activated = reference.swiglu(x.double() @ gate.T, x.double() @ up.T)  # (tokens, width)
    return activated.abs().amax(dim=1, keepdim=True) / 254 * down.abs().sum(dim=1)
