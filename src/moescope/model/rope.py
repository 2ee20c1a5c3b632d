"""Rotary positions: plain, linear, Llama-3 and YaRN."""

import math

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig, RopeScaling
from moescope.kernels import fused


class RotaryEmbedding(nn.Module):
    """Angles for rotary position embeddings (Su et al. 2021, eq. 15).

    `inv_freq` has shape `(rotated width / 2,)`; `attention_factor` multiplies cosine and sine.

    Args:
        config: of the network.
        compressed: whether they are those of layers with compressed entries (DeepSeek-V4), which
            have a base of their own and alone are stretched, without a temperature.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, *, compressed: bool = False) -> None:
        super().__init__()
        theta, scaling = config.rope_theta, config.rope_scaling
        if compressed:
            theta = config.compress_rope_theta
            if scaling is not None and scaling.attention_factor is None:
                scaling = scaling.model_copy(update={"attention_factor": 1.0})
        elif config.compress_rates is not None:
            scaling = None
        with torch.device("cpu"):  # numbers, even where the network is made without
            inv_freq, self.attention_factor = _frequencies(
                config.rotary_dim, theta, scaling, config.max_position_embeddings
            )
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, `(batch, seq, 1, rotated width / 2)`, for `(batch, seq)`."""
        angles = positions[..., None, None].float() * self.inv_freq.float()
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)


@fused
def rotate(states: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    """Rotate `(batch, seq, heads, width)` by the angles of `RotaryEmbedding`.

    Where there are fewer angles than half the width, the numbers behind them stay as they are.

    Pairs are neighbours when `interleave` (DeepSeek's latent attention), else halves (Llama).
    The rotated pairs come out as halves either way; queries and keys agree on it.
    """
    rotated = 2 * cos.shape[-1]
    states, rest = states[..., :rotated], states[..., rotated:]
    if interleave:
        first, second = states[..., 0::2], states[..., 1::2]
    else:
        first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN (Peng et al. 2023, eq. 22): `0.1 * mscale * ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention logits: `qk_head_dim ** -0.5`, times YaRN's `mscale_all_dim` squared.

    A config's `attention_multiplier` takes the place of the root. DeepSeek-V2 (section 3.1.4)
    folds the temperature into the latent attention's scale.
    """
    scale = config.attention_multiplier or config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if config.uses_mla and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _frequencies(
    width: int, theta: float, scaling: RopeScaling | None, max_position_embeddings: int
) -> tuple[Tensor, float]:
    inv_freq = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return inv_freq, 1.0
    trained = scaling.original_max_position_embeddings or max_position_embeddings
    if scaling.type == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(inv_freq, scaling, trained), 1.0
    return _yarn(inv_freq, scaling, trained, width, theta), _yarn_attention_factor(scaling)


def _yarn(inv_freq: Tensor, scaling: RopeScaling, trained: int, width: int, theta: float) -> Tensor:
    """Interpolate slow frequencies, keep fast ones (Peng et al. 2023, eq. 17-19)."""

    def dimension_of(rotations: float) -> float:
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0, 1)
    return inv_freq / scaling.factor * interpolated + inv_freq * (1 - interpolated)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_mscale(scaling.factor, 1.0)


def _llama3(inv_freq: Tensor, scaling: RopeScaling, trained: int) -> Tensor:
    """Blend by wavelength, as the Llama 3.1 release defines `rope_type: llama3`."""
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = trained * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * keep + inv_freq / scaling.factor * (1 - keep)
