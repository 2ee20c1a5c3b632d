"""Llama 3's stretched positions, of which GGUF keeps one factor a frequency and nothing else."""

from math import pi
from pathlib import Path
from typing import Any

import numpy as np

from moescope.config import RopeScaling
from moescope.errors import UserError

LOW, HIGH = 1.0, 4.0
TRAINED = 8192
"""`low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of all releases."""


def llama3_factors(width: int, theta: float, scaling: RopeScaling) -> list[float]:
    """Return by what each of `width / 2` frequencies is divided, as Llama 3.1 defines it."""
    low, high = scaling.low_freq_factor or LOW, scaling.high_freq_factor or HIGH
    trained = scaling.original_max_position_embeddings or TRAINED
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    keep = np.clip((trained * frequencies / (2 * pi) - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling.factor)).tolist()


def llama3_scaling(
    path: Path, factors: list[float], theta: float, trained: int | None
) -> dict[str, Any]:
    """Return the `rope_scaling` whose factors a file holds.

    Args:
        path: of the file, for the message.
        factors: of `rope_freqs.weight`.
        theta: base of the frequencies.
        trained: context that the model was first trained on, where the file says so.

    Raises:
        UserError: they are not those of a Llama 3.
    """
    scaling: dict[str, Any] = {
        "type": "llama3",
        "factor": round(max(factors), 4),
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": trained or TRAINED,
    }
    expected = llama3_factors(2 * len(factors), theta, RopeScaling(**scaling))
    if not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{path}: rope_freqs.weight stretches positions in a way that moescope does not know"
        )
    return scaling
