"""The learning rate over a training: warm-up, stable, decay."""

from typing import Literal


def warmup_stable_decay(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    decay: Literal["linear", "sqrt"],
) -> float:
    """Factor of the peak learning rate at `step`, counted from zero (Hu et al. 2024, MiniCPM, 4.1).

    Rises linearly over the first `warmup_steps`, stays at one, and falls over the last
    `decay_steps`: `1 - x` (linear) or `1 - sqrt(x)` (Haegele et al. 2024, eq. 1), where `x` is
    the share of the decay that is done. A checkpoint of the stable phase is good for any number
    of further steps, as nothing before the decay depends on `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    into_decay = step - (steps - decay_steps)
    if into_decay < 0:
        return 1.0
    share = (into_decay + 1) / (decay_steps + 1)
    return 1 - share if decay == "linear" else 1 - share**0.5
