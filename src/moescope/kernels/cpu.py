"""The native CPU kernels (`csrc/`), called with tensors.

Weights are int8 (a scale a row) or int4 (a scale for 32 columns), activations float32; products
are taken in integers, the activations being rounded to int8 with a scale for 64 columns, or 32.
Where the extension was not built, `available()` says so and nothing else here may be called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from moescope.errors import UserError

if TYPE_CHECKING:
    from moescope.kernels import _native
    from moescope.kernels._native import AbsorbedAttention, FeedForward, Weights
else:
    try:
        from moescope.kernels import _native
        from moescope.kernels._native import AbsorbedAttention, FeedForward, Weights
    except ImportError:
        _native = None


def available() -> bool:
    """Whether the extension was built for this Python."""
    return bool(_native)


def instruction_set() -> str | None:
    """The instruction set that the kernels use here; None without the extension.

    Raises:
        UserError: `MOESCOPE_ISA` names one that this processor lacks.
    """
    if not available():
        return None
    try:
        return _native.instruction_set()
    except ValueError as error:
        raise UserError(str(error)) from error


def instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, the best first; none without the extension."""
    return _native.instruction_sets() if available() else []


def use_instruction_set(name: str) -> None:
    """Use another of `instruction_sets()` from now on; weights need not be packed again.

    Raises:
        UserError: the processor lacks it.
    """
    try:
        _native.use_instruction_set(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def threads() -> int:
    """Return how many threads share the work, the caller's included."""
    return _native.threads()


def set_threads(count: int) -> None:
    """Share the work among `count` threads from now on."""
    _native.set_threads(count)


def pack(matrices: Tensor, weight_format: str) -> Weights:
    """Round and lay out `(matrices, outputs, columns)` or `(outputs, columns)`.

    Args:
        matrices: float32 or bfloat16.
        weight_format: `int8` or `int4`.
    """
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.dtype not in (torch.float32, torch.bfloat16):
        matrices = matrices.float()
    return _native.pack(to_dlpack(matrices.detach()), weight_format)


def linear(weights: Weights, outputs: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map `(..., columns)` to `(..., outputs)` float32."""
    rows = _rows(x)  # (rows, columns)
    out = torch.empty(len(rows), outputs)
    weights.linear(to_dlpack(rows), None if bias is None else to_dlpack(bias), to_dlpack(out))
    return out.view(*x.shape[:-1], outputs)


def expert_weights(
    gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, weight_format: str
) -> tuple[Weights, Weights, Weights]:
    """Pack experts' matrices: `(experts, intermediate, hidden)` twice, and the transposed shape."""
    gate, up, down = (pack(matrix, weight_format) for matrix in (gate_proj, up_proj, down_proj))
    return gate, up, down


def feed_forward_layer(
    routed: tuple[Weights, Weights, Weights] | None,
    shared: tuple[Weights, Weights, Weights] | None,
) -> FeedForward:
    """Join routed experts and shared ones, or either alone, into one call."""
    nothing = (None, None, None)
    return _native.FeedForward(*(routed or nothing), *(shared or nothing))


def feed_forward(
    layer: FeedForward,
    hidden_states: Tensor,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted, and the shared experts' (DeepSeekMoE, eq. 9).

    Args:
        layer: made by `feed_forward_layer`.
        hidden_states: `(..., hidden)`.
        topk_ids: `(tokens, slots)` int64; negative marks an unused slot.
        topk_weights: `(tokens, slots)` float32.
    """
    rows = _rows(hidden_states)  # (tokens, hidden)
    out = torch.empty_like(rows)
    if topk_ids is None or topk_weights is None:
        layer(to_dlpack(rows), None, None, to_dlpack(out))
    else:
        ids, weights = topk_ids.contiguous(), topk_weights.float().contiguous()
        layer(to_dlpack(rows), to_dlpack(ids), to_dlpack(weights), to_dlpack(out))
    return out.view(hidden_states.shape)


def absorbed_attention(
    kv_b_proj: Tensor, nope: int, scale: float, weight_format: str
) -> AbsorbedAttention:
    """Pack `kv_b_proj` `(heads, nope + v_head_dim, kv_lora_rank)` for `attend_absorbed`."""
    up_key = kv_b_proj[:, :nope].mT.contiguous()  # (heads, rank, nope)
    up_value = kv_b_proj[:, nope:].contiguous()  # (heads, v_head_dim, rank)
    return _native.AbsorbedAttention(
        pack(up_key, weight_format), pack(up_value, weight_format), scale
    )


def attend_absorbed(
    attention: AbsorbedAttention,
    q_nope: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    v_head_dim: int,
) -> Tensor:
    """Attend in the latent space, one query a sequence (DeepSeek-V2, section 2.1.2).

    Args:
        attention: made by `absorbed_attention`.
        q_nope: `(batch, heads, nope)`.
        q_rope: `(batch, heads, rope)`, rotated.
        latents: `(batch, slots, kv_lora_rank)`, normed.
        k_rope: `(batch, slots, rope)`, rotated.
        lengths: `(batch,)` int64, slots that each sequence sees.
        v_head_dim: width of a value.

    Returns:
        `(batch, heads, v_head_dim)`.
    """
    out = torch.empty(*q_nope.shape[:2], v_head_dim)
    attention(
        to_dlpack(q_nope.contiguous()),
        to_dlpack(q_rope.contiguous()),
        to_dlpack(latents),
        to_dlpack(k_rope),
        to_dlpack(lengths),
        to_dlpack(out),
    )
    return out


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm`, in float32 for `(..., width)`."""
    rows = _rows(hidden_states)
    out = torch.empty_like(rows)
    _native.rms_norm(to_dlpack(rows), to_dlpack(weight), eps, to_dlpack(out))
    return out.view(hidden_states.shape)


def weight_bytes_read() -> int:
    """Bytes of weights that the kernels have read since the process began."""
    return _native.weight_bytes_read()


def unpacked(weights: Weights, shape: tuple[int, int, int]) -> Tensor:
    """The weights as the kernels see them: `shape` is `(matrices, outputs, columns)`."""
    out = torch.empty(shape)
    weights.unpack(to_dlpack(out))
    return out


def _rows(x: Tensor) -> Tensor:
    return x.float().reshape(-1, x.shape[-1]).contiguous()
