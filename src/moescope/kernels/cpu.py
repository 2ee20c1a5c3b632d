"""The native CPU kernels (`csrc/`), called with tensors.

Weights are int8 (a scale a row), int4 (a scale and a minimum for 32 columns), the block types of
GGUF files or floating point (`native/weight_format.py`); activations are float32. Products with
integers and code words are taken in integers, the activations being rounded to int8 with a scale
for 64 columns (int8), 16 (Q6_K) or 32; with floating point they are taken as they are.
Where the extension was not built, `available()` says so and nothing else here may be called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]

from moescope.errors import UserError

if TYPE_CHECKING:
    from moescope.kernels import _native
    from moescope.kernels._native import (
        AbsorbedAttention,
        Attention,
        CacheSlots,
        Decoder,
        FeedForward,
        FeedForwardBlock,
        GroupedAttention,
        LatentAttention,
        ReadProbe,
        Router,
        Weights,
    )
else:
    try:
        from moescope.kernels import _native
        from moescope.kernels._native import (
            AbsorbedAttention,
            Attention,
            CacheSlots,
            Decoder,
            FeedForward,
            FeedForwardBlock,
            GroupedAttention,
            LatentAttention,
            ReadProbe,
            Router,
            Weights,
        )
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


def measure_read_bandwidth(
    seconds: float = 1.0, huge_pages: bool = True, working_set: int = 2**29
) -> float:
    """Measure the bytes/s at which all threads together read memory, as products read weights.

    Args:
        seconds: time to spend, about; the median pass counts, of at least three.
        huge_pages: whether 2 MiB pages are asked for, as weights have them, or 4 KiB ones.
        working_set: bytes that are read over and over; what the caches hold is read faster.
    """
    probe = _read_probe(working_set, huge_pages)
    probe.read()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        probe.read()
        times.append(time.perf_counter() - start)
    return working_set / statistics.median(times)


@cache
def _read_probe(size: int, huge_pages: bool) -> ReadProbe:
    return _native.ReadProbe(size, huge_pages)


def pack(matrices: Tensor, weight_format: str, importance: Tensor | None = None) -> Weights:
    """Round and lay out `(matrices, outputs, columns)` or `(outputs, columns)`.

    Args:
        matrices: float32 or bfloat16.
        weight_format: `int8`, `int4`, `bf16`, `f16` or `f32`.
        importance: how much an error in each column counts in int4's search, `(columns,)`.
    """
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.dtype not in (torch.float32, torch.bfloat16):
        matrices = matrices.float()
    counts = None if importance is None else importance.float()
    return _native.pack(to_dlpack(matrices.detach()), weight_format, _optional(counts))


def quantize_blocks(rows: Tensor, block_type: str) -> NDArray[np.uint8]:
    """Round `(rows, columns)` to the blocks that GGUF files store, `(rows, bytes)`.

    Scales and minima are searched for: the weighted squared error is least, a number's weight being
    its magnitude plus the root mean square of its row.

    Args:
        rows: float32; columns make whole blocks.
        block_type: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q4_K, Q5_K or Q6_K.
    """
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    out = np.empty((len(rows), rows.shape[1] // numbers * size), np.uint8)
    _native.quantize_blocks(to_dlpack(rows.detach().contiguous()), block_type, out)
    return out


def pack_blocks(data: NDArray[np.uint8], kind: str, shape: tuple[int, int, int]) -> Weights:
    """Lay out a GGUF tensor's blocks, whose numbers stay what they are.

    Args:
        data: whole blocks, rows after rows, matrices after matrices; of numbers, their bytes.
        kind: the tensor's type as GGUF names it (`Q4_K`, `MXFP4`, `F16` ...); for `F8_E4M3`, 128
            columns and, in front of them, their float32 scale make a block, the last one padded.
        shape: `(matrices, outputs, columns)`.

    Raises:
        ValueError: the type is none of `BLOCK_FORMATS`, or such a shape takes another size.
    """
    return _native.pack_blocks(data.reshape(-1), kind, *shape)


def empty_weights(weight_format: str, shape: tuple[int, int, int]) -> Weights:
    """Return zeros, whose matrices `put` replaces: `put(index, packed)`, of one matrix.

    Args:
        weight_format: any of `WEIGHT_FORMATS`.
        shape: `(matrices, outputs, columns)`.
    """
    return _native.empty_weights(weight_format, *shape)


def layout() -> str:
    """Name the way in which packed weights lie in memory; what it changes for cannot be read."""
    return _native.layout()


def stored_bytes(packed: Weights) -> NDArray[np.uint8]:
    """View all bytes of packed weights."""
    return packed.stored


def checksum(data: NDArray[np.uint8]) -> int:
    """Sum bytes so that damage shows, at the speed of memory."""
    return _native.checksum(data)


def read_weights(
    descriptor: int, offset: int, size: int, weight_format: str, shape: tuple[int, int, int]
) -> tuple[Weights, int]:
    """Take packed weights from an open file; return them and their checksum.

    Large ones are mapped where the system can, so that they are there at once; `settle` moves them.

    Args:
        descriptor: of the file.
        offset: where they begin.
        size: bytes.
        weight_format: any of `WEIGHT_FORMATS`.
        shape: `(matrices, outputs, columns)`.

    Raises:
        ValueError: weights of this shape and format have another size.
        RuntimeError: the file cannot be read or ends too early.
    """
    return _native.read_weights(descriptor, offset, size, weight_format, *shape)


def stream_weights(
    descriptor: int, offset: int, size: int, weight_format: str, shape: tuple[int, int, int]
) -> Weights:
    """Take experts from an open file, each of which stays there until a token visits it.

    Args:
        descriptor: of the file, which may be closed afterwards.
        offset: where they begin.
        size: bytes.
        weight_format: `int8`, `int4` or `bf16`.
        shape: `(experts, outputs, columns)`.

    Raises:
        ValueError: weights of this shape have another size.
        RuntimeError: the file ends too early or cannot be read.
    """
    return _native.stream_weights(descriptor, offset, size, weight_format, *shape)


@dataclass(frozen=True)
class ExpertCounts:
    """What became of streamed experts since the process began.

    Attributes:
        visits: experts that a layer asked for, once for all tokens that came together.
        hits: of them, those that were in memory.
        bytes_read: from files.
        held: bytes that are in memory now.
        limit: bytes that may be.
    """

    visits: int
    hits: int
    bytes_read: int
    held: int
    limit: int


def limit_experts(limit: int) -> None:
    """Keep so many bytes of streamed experts in memory; those longest unused go first."""
    _native.limit_experts(limit)


def expert_counts() -> ExpertCounts:
    """Return the counts of streamed experts; all zero where none are."""
    return ExpertCounts(*_native.expert_counts())


def settle() -> None:
    """Begin to move mapped weights into 2 MiB pages, in a thread of its own, while they are used.

    They are read faster there. A file that is cut before that is done ends the process.
    """
    _native.settle()


def unsettled() -> int:
    """Bytes of weights taken from files that `settle` has still to move."""
    return _native.unsettled()


def rows(weights: Weights, ids: Tensor, width: int) -> Tensor:
    """Take rows `ids` `(...)` int64 out of one packed matrix: `(..., width)` float32.

    Raises:
        ValueError: there is no such row.
    """
    flat = ids.flatten().contiguous()
    out = torch.empty(len(flat), width)
    weights.rows(to_dlpack(flat), to_dlpack(out))
    return out.view(*ids.shape, width)


def linear(weights: Weights, outputs: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map `(..., columns)` to `(..., outputs)` float32; several matrices' outputs lie in a row."""
    x = x.float().contiguous()
    out = torch.empty(*x.shape[:-1], outputs)
    weights.linear(to_dlpack(x), None if bias is None else to_dlpack(bias), to_dlpack(out))
    return out


def feed_forward_layer(
    routed: tuple[Weights, Weights, Weights] | None,
    shared: tuple[Weights, Weights, Weights] | None,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    act: str = "silu",
    limit: float | None = None,
    shared_limit: float | None = None,
) -> FeedForward:
    """Join routed experts and shared ones, or either alone, into one call.

    Args:
        routed: packed gate, up and down matrices of the experts that tokens choose.
        shared: those of the expert that every token visits.
        biases: of the routed experts' gate, up `(experts, intermediate)` and down
            `(experts, hidden)`.
        act: of the routed experts: `silu` for `silu(gate) * up`, `swigluoai` for gpt-oss's
            `(up + 1) * gate * sigmoid(1.702 * gate)`.
        limit: bounds the routed experts' gate from above and up from both sides before they meet.
        shared_limit: likewise of the shared expert.
    """
    nothing = (None, None, None)
    gate_bias, up_bias, down_bias = biases or nothing
    return _native.FeedForward(
        *(routed or nothing),
        *(shared or nothing),
        _optional(gate_bias),
        _optional(up_bias),
        _optional(down_bias),
        act == "swigluoai",
        limit,
        shared_limit,
    )


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


def absorbed_attention(up_key: Weights, up_value: Weights, scale: float) -> AbsorbedAttention:
    """Join the halves of `kv_b_proj` for `attend_absorbed`.

    Args:
        up_key: `(heads, kv_lora_rank, qk_nope_head_dim)`.
        up_value: `(heads, v_head_dim, kv_lora_rank)`.
        scale: of the attention logits.
    """
    return _native.AbsorbedAttention(up_key, up_value, scale)


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
        latents: `(batch, slots, kv_lora_rank)`, normed, bf16 or float32.
        k_rope: `(batch, slots, rope)`, rotated, of the same type.
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


def latent_attention(
    input_norm: tuple[Tensor, float],
    query_down: tuple[Weights, Tensor | None, Tensor] | None,
    query: Weights,
    latent: tuple[Weights, Tensor | None],
    latent_norm: tuple[Tensor, float],
    absorbed: AbsorbedAttention,
    expand: Weights,
    output: tuple[Weights, Tensor | None],
    interleave: bool,
    residual_multiplier: float = 1.0,
) -> LatentAttention:
    """Join a norm and the parts of latent attention: half a layer of `decoder`.

    Args:
        input_norm: weight and epsilon.
        query_down: `q_a_proj`, its bias and the weight of its norm, where there is one.
        query: `q_proj` or `q_b_proj`.
        latent: `kv_a_proj_with_mqa` and its bias.
        latent_norm: weight and epsilon, the latter also of the query's norm.
        absorbed: made by `absorbed_attention`, for new tokens one a sequence.
        expand: `kv_b_proj`, one matrix a head, for prompts.
        output: `o_proj` and its bias.
        interleave: whether rotated pairs are neighbours.
        residual_multiplier: of what is added to the residual stream.
    """
    down, down_bias, down_norm = query_down or (None, None, None)
    return _native.latent_attention(
        to_dlpack(input_norm[0].detach()),
        input_norm[1],
        down,
        _optional(down_bias),
        _optional(down_norm),
        query,
        latent[0],
        _optional(latent[1]),
        to_dlpack(latent_norm[0].detach()),
        latent_norm[1],
        absorbed,
        expand,
        output[0],
        _optional(output[1]),
        interleave,
        residual_multiplier,
    )


def grouped_attention(
    input_norm: tuple[Tensor, float],
    query: tuple[Weights, Tensor | None],
    key: tuple[Weights, Tensor | None],
    value: tuple[Weights, Tensor | None],
    output: tuple[Weights, Tensor | None],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    rope: int,
    interleave: bool,
    clip: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    residual_multiplier: float = 1.0,
) -> GroupedAttention:
    """Join a norm and the parts of grouped-query attention: half a layer of `decoder`.

    Args:
        input_norm: weight and epsilon.
        query: `q_proj` and its bias.
        key: `k_proj` and its bias.
        value: `v_proj` and its bias.
        output: `o_proj` and its bias.
        heads: of queries, a multiple of `kv_heads`.
        kv_heads: of keys and values.
        scale: factor of the attention logits.
        query_norm: weight of the norm before the rotation, of each head `(width,)` or of all at
            once `(heads * width,)`; its epsilon is the input norm's.
        key_norm: likewise.
        rope: how many numbers of a head are rotated, from its front.
        interleave: whether rotated pairs are neighbours.
        clip: bound on the magnitude of queries, keys and values before the rotation.
        window: slots that a query sees, its own included; None for all.
        sinks: `(heads,)` logits that join the softmax and take no value (gpt-oss).
        residual_multiplier: of what is added to the residual stream.
    """
    return _native.grouped_attention(
        to_dlpack(input_norm[0].detach()),
        input_norm[1],
        query[0],
        _optional(query[1]),
        key[0],
        _optional(key[1]),
        value[0],
        _optional(value[1]),
        output[0],
        _optional(output[1]),
        heads,
        kv_heads,
        scale,
        _optional(query_norm),
        _optional(key_norm),
        rope,
        interleave,
        clip,
        window,
        _optional(sinks),
        residual_multiplier,
    )


def router(
    weight: Tensor,
    *,
    top_k: int,
    logit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    best_of_group: int = 1,
    scoring: str,
    normalise: bool,
    factor: float,
    disabled: Iterable[int] = (),
    forced: Iterable[int] = (),
    table: Tensor | None = None,
) -> Router:
    """Make a router: scores, then the `top_k` best of the `kept_groups` best groups.

    Args:
        weight: `(experts, hidden)` float32, contiguous; it is not copied.
        top_k: experts of a token.
        logit_bias: `(experts,)`, of the linear map.
        bias: `(experts,)`, added to the scores for the choice only.
        groups: equal groups of neighbouring experts.
        kept_groups: groups that a token may use.
        best_of_group: how many of its best scores, summed, rank a group.
        scoring: `softmax`, `sigmoid` or `sqrtsoftplus` of the logits; or `relu`, where logits
            above zero alone are chosen.
        normalise: whether a token's weights are made to sum to one.
        factor: of the weights.
        disabled: experts that are as if they did not exist.
        forced: experts that every token visits, of whatever group.
        table: `(vocab, top_k)` int64, the experts of each token id, in place of the best.
    """
    return _native.router(
        to_dlpack(weight.detach()),
        _optional(logit_bias),
        _optional(bias),
        top_k,
        groups,
        kept_groups,
        best_of_group,
        scoring,
        normalise,
        factor,
        list(disabled),
        list(forced),
        _optional(table),
    )


def route(
    rule: Router, hidden_states: Tensor, top_k: int, input_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `topk_ids` and `topk_weights`, `(tokens, top_k)`, for `(tokens, hidden)`.

    A slot for which no expert is left has id -1 and weight 0. `input_ids` `(tokens,)` matter to a
    router with a table only.
    """
    topk_ids = torch.empty(len(hidden_states), top_k, dtype=torch.int64)
    topk_weights = torch.empty(len(hidden_states), top_k)
    ids = _optional(input_ids)
    rule(to_dlpack(_rows(hidden_states)), ids, to_dlpack(topk_ids), to_dlpack(topk_weights))
    return topk_ids, topk_weights


def feed_forward_block(
    norm: tuple[Tensor, float],
    rule: Router | None,
    layer: FeedForward,
    residual_multiplier: float = 1.0,
) -> FeedForwardBlock:
    """Join a norm, a router (None for a dense layer) and experts: half a layer of `decoder`."""
    weight = to_dlpack(norm[0].detach())
    return _native.feed_forward_block(weight, norm[1], rule, layer, residual_multiplier)


def decoder(
    embedding: Weights,
    attention: list[Attention],
    feed_forward: list[FeedForwardBlock],
    rotation: tuple[Tensor, float],
    embedding_multiplier: float = 1.0,
) -> Decoder:
    """Join an embedding and all layers into one call for `run_decoder`.

    Args:
        embedding: `(vocab, hidden)`, packed.
        attention: of each layer.
        feed_forward: of each layer.
        rotation: frequencies `(rotated width / 2,)` of rotary positions, and the factor of
            cosine and sine.
        embedding_multiplier: of what the embedding hands on.
    """
    frequencies, factor = rotation
    return _native.decoder(
        embedding,
        attention,
        feed_forward,
        to_dlpack(frequencies.float().contiguous()),
        factor,
        embedding_multiplier,
    )


def cache_slots(slots: list[tuple[Tensor, Tensor]]) -> CacheSlots:
    """Make the cache of all layers ready for `run_decoder`, whose calls write to the same tensors.

    Args:
        slots: for each layer keys and values, `(blocks, slots, ...)`, all bf16 or all float32; for
            latent attention the latents and the rotated keys.
    """
    return _native.CacheSlots(
        [to_dlpack(keys.flatten(2)) for keys, _ in slots],
        [to_dlpack(values.flatten(2)) for _, values in slots],
    )


@dataclass(frozen=True)
class Chosen:
    """What routers chose, `(layers with routers, tokens, slots)` each.

    Attributes:
        ids: of experts, int64; -1 in a slot that no expert is left for.
        weights: float32.
        scores: before they became weights, float32.
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor


@dataclass(frozen=True)
class RowRouters:
    """Other routers than a decoder's own for some rows.

    Attributes:
        sets: routers of all layers, None where one has no routed experts.
        set_of_row: for each row the place of its routers in `sets`, or -1.
    """

    sets: list[list[Router | None]]
    set_of_row: list[int]


def choices(layers: Decoder, depth: int, tokens: int, others: RowRouters | None) -> Chosen:
    """Room for what `depth` routers of a decoder choose for so many tokens."""
    slots = layers.most_slots([] if others is None else others.sets)
    shape = depth, tokens, slots
    ids = torch.empty(shape, dtype=torch.int64)
    return Chosen(ids, torch.empty(shape), torch.empty(shape))


def run_decoder(
    layers: Decoder,
    input_ids: Tensor,
    hidden: int,
    positions: Tensor,
    starts: Tensor,
    singles: int,
    table: Tensor,
    slots: CacheSlots,
    others: RowRouters | None = None,
    chosen: Chosen | None = None,
) -> Tensor:
    """Embed the tokens of several rows and run all layers: `(tokens, hidden)` float32.

    Args:
        layers: made by `decoder`.
        input_ids: `(tokens,)` int64, below the rows of the embedding, one row after the other.
        hidden: width of the embedding.
        positions: `(tokens,)` int64, each in one of its row's blocks.
        starts: `(rows + 1,)` int64, where the rows begin among the tokens, and the end.
        singles: how many rows, the first ones, have one token that is read as generated ones are.
        table: `(rows, width)` int64, the blocks in which a row's slots lie, in order.
        slots: to which the new tokens' keys and values are written.
        others: routers of rows that have others than the network; no other row's numbers change.
        chosen: made by `choices`, gets what is chosen.
    """
    out = torch.empty(*input_ids.shape, hidden)
    layers(
        to_dlpack(input_ids.contiguous()),
        to_dlpack(positions.contiguous()),
        to_dlpack(starts),
        singles,
        to_dlpack(table.contiguous()),
        slots,
        [] if others is None else others.sets,
        [] if others is None else others.set_of_row,
        None if chosen is None else to_dlpack(chosen.ids),
        None if chosen is None else to_dlpack(chosen.weights),
        None if chosen is None else to_dlpack(chosen.scores),
        to_dlpack(out),
    )
    return out


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of `(rows, vocab)`, in order, of equal ones the first.

    Returns their ids, int64, and their logits, both `(rows, count)`.
    """
    rows = _rows(logits)
    ids, values = torch.empty(len(rows), count, dtype=torch.int64), torch.empty(len(rows), count)
    _native.likeliest(to_dlpack(rows), to_dlpack(ids), to_dlpack(values))
    return ids, values


def log_sums(logits: Tensor, scale: float = 1.0) -> Tensor:
    """`log(sum(exp(scale * logits)))` of each row of `(rows, vocab)`: `(rows,)`."""
    rows = _rows(logits)
    out = torch.empty(len(rows))
    _native.log_sums(to_dlpack(rows), scale, to_dlpack(out))
    return out


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm`, in float32 for `(..., width)`."""
    x = hidden_states.float().contiguous()
    out = torch.empty_like(x)
    _native.rms_norm(to_dlpack(x), to_dlpack(weight), eps, to_dlpack(out))
    return out


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


def _optional(tensor: Tensor | None) -> object:
    return None if tensor is None else to_dlpack(tensor.detach().contiguous())
