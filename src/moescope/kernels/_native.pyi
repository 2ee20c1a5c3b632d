"""What the extension offers (csrc/module.cpp, csrc/bind_*.cpp).

Arrays are float32 or int64 on the CPU, contiguous.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""A DLPack capsule, or what has a `__dlpack__` method."""

class ReadProbe:
    def __init__(self, bytes: int, huge_pages: bool) -> None: ...
    def read(self) -> int: ...

class Weights:
    matrix_bytes: int
    format: str
    stored: NDArray[np.uint8]
    def unpack(self, out: Array) -> None: ...
    def put(self, index: int, one: Weights) -> None: ...
    def rows(self, ids: Array, out: Array) -> None: ...
    def linear(self, x: Array, bias: Array | None, out: Array) -> None: ...

class FeedForward:
    def __init__(
        self,
        gate: Weights | None,
        up: Weights | None,
        down: Weights | None,
        shared_gate: Weights | None,
        shared_up: Weights | None,
        shared_down: Weights | None,
        gate_bias: Array | None,
        up_bias: Array | None,
        down_bias: Array | None,
        swigluoai: bool,
        limit: float | None,
        shared_limit: float | None,
    ) -> None: ...
    def __call__(
        self, x: Array, topk_ids: Array | None, topk_weights: Array | None, out: Array
    ) -> None: ...

class AbsorbedAttention:
    weight_bytes: int
    def __init__(self, up_key: Weights, up_value: Weights, scale: float) -> None: ...
    def __call__(
        self,
        q_nope: Array,
        q_rope: Array,
        latents: Array,
        k_rope: Array,
        lengths: Array,
        out: Array,
    ) -> None: ...

class Attention: ...
class LatentAttention(Attention): ...
class GroupedAttention(Attention): ...

class Router:
    def __call__(
        self, x: Array, ids: Array | None, topk_ids: Array, topk_weights: Array
    ) -> None: ...

class FeedForwardBlock: ...

class CacheSlots:
    def __init__(self, keys: list[Array], values: list[Array]) -> None: ...

class Decoder:
    def __call__(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        starts: Sequence[int],
        singles: int,
        tables: Sequence[Sequence[int]],
        cache: CacheSlots,
        sets: list[list[Router | None]],
        set_of_row: list[int],
        wanted: Sequence[int],
        topk_ids: Array | None,
        topk_weights: Array | None,
        topk_scores: Array | None,
        out: Array,
    ) -> None: ...
    def most_slots(self, sets: list[list[Router | None]]) -> int: ...

class Head:
    def __call__(self, states: Array, out: Array) -> None: ...

def head(norm: Array, eps: float, weights: Weights, bias: Array | None) -> Head: ...
def latent_attention(
    input_norm: Array,
    eps: float,
    query_down: Weights | None,
    query_down_bias: Array | None,
    query_norm: Array | None,
    query: Weights,
    latent: Weights,
    latent_bias: Array | None,
    latent_norm: Array,
    latent_eps: float,
    absorbed: AbsorbedAttention,
    expand: Weights,
    output: Weights,
    output_bias: Array | None,
    interleave: bool,
    residual_multiplier: float,
) -> LatentAttention: ...
def grouped_attention(
    input_norm: Array,
    eps: float,
    query: Weights,
    query_bias: Array | None,
    key: Weights,
    key_bias: Array | None,
    value: Weights,
    value_bias: Array | None,
    output: Weights,
    output_bias: Array | None,
    heads: int,
    kv_heads: int,
    scale: float,
    query_norm: Array | None,
    key_norm: Array | None,
    rope: int,
    interleave: bool,
    clip: float | None,
    window: int | None,
    sinks: Array | None,
    residual_multiplier: float,
) -> GroupedAttention: ...
def decoder(
    embedding: Weights,
    attention: list[Attention],
    feed_forward: list[FeedForwardBlock],
    frequencies: Array,
    rotation_factor: float,
    embedding_multiplier: float,
) -> Decoder: ...
def likeliest(logits: Array, ids: Array, values: Array) -> None: ...
def log_sums(logits: Array, scale: float, out: Array) -> None: ...
def shortlist(
    logits: Array, count: int, scales: Sequence[float]
) -> tuple[list[list[int]], list[list[float]], list[float], list[float]]: ...
def router(
    weight: Array,
    logit_bias: Array | None,
    bias: Array | None,
    top_k: int,
    groups: int,
    kept_groups: int,
    best_of_group: int,
    scoring: str,
    normalise: bool,
    factor: float,
    disabled: list[int],
    forced: list[int],
    table: Array | None,
) -> Router: ...
def feed_forward_block(
    norm: Array, eps: float, router: Router | None, layer: FeedForward, residual_multiplier: float
) -> FeedForwardBlock: ...
def pack(matrices: Array, format: str, importance: Array | None) -> Weights: ...
def quantize_blocks(rows: Array, type: str, out: Array) -> None: ...
def pack_blocks(blocks: Array, type: str, matrices: int, outputs: int, columns: int) -> Weights: ...
def layout() -> str: ...
def checksum(data: Array) -> int: ...
def settle() -> None: ...
def unsettled() -> int: ...
def empty_weights(format: str, matrices: int, outputs: int, columns: int) -> Weights: ...
def read_weights(
    descriptor: int,
    offset: int,
    bytes: int,
    format: str,
    matrices: int,
    outputs: int,
    columns: int,
) -> tuple[Weights, int]: ...
def stream_weights(
    descriptor: int,
    offset: int,
    bytes: int,
    format: str,
    matrices: int,
    outputs: int,
    columns: int,
) -> Weights: ...
def limit_experts(bytes: int) -> None: ...
def expert_counts() -> list[int]: ...
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def weight_bytes_read() -> int: ...
