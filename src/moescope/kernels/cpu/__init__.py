"""The native CPU kernels (`csrc/`), called with tensors.

Weights are int8 (a scale a row), int4 (a scale and a minimum for 32 columns), the block types of
GGUF files or floating point (`native/weight_format.py`); activations are float32. Products with
integers and code words are taken in integers, the activations being rounded to int8 with a scale
for 64 columns (int8), 16 (Q6_K) or 32; with floating point they are taken as they are.
Where the extension was not built, `available()` says so and nothing else here may be called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moescope.kernels.cpu.attention import (
    absorbed_attention,
    attend_absorbed,
    grouped_attention,
    latent_attention,
)
from moescope.kernels.cpu.extension import (
    available,
    instruction_set,
    instruction_sets,
    measure_read_bandwidth,
    set_threads,
    threads,
    use_instruction_set,
    weight_bytes_read,
)
from moescope.kernels.cpu.layers import (
    cache_slots,
    decoder,
    feed_forward_block,
    head,
    run_decoder,
    run_head,
)
from moescope.kernels.cpu.logits import (
    likeliest,
    log_sums,
    shortlist,
)
from moescope.kernels.cpu.products import (
    feed_forward,
    feed_forward_layer,
    linear,
    rms_norm,
    rows,
)
from moescope.kernels.cpu.routing import (
    Chosen,
    RowRouters,
    choices,
    route,
    router,
)
from moescope.kernels.cpu.streaming import (
    ExpertCounts,
    expert_counts,
    limit_experts,
    stream_weights,
)
from moescope.kernels.cpu.weights import (
    checksum,
    empty_weights,
    layout,
    pack,
    pack_blocks,
    quantize_blocks,
    read_weights,
    settle,
    stored_bytes,
    unpacked,
    unsettled,
)

if TYPE_CHECKING:  # the extension's own types, for annotations
    from moescope.kernels._native import (
        AbsorbedAttention as AbsorbedAttention,
        Attention as Attention,
        CacheSlots as CacheSlots,
        Decoder as Decoder,
        FeedForward as FeedForward,
        FeedForwardBlock as FeedForwardBlock,
        GroupedAttention as GroupedAttention,
        Head as Head,
        LatentAttention as LatentAttention,
        Router as Router,
        Weights as Weights,
    )

__all__ = [
    "Chosen",
    "ExpertCounts",
    "RowRouters",
    "absorbed_attention",
    "attend_absorbed",
    "available",
    "cache_slots",
    "checksum",
    "choices",
    "decoder",
    "empty_weights",
    "expert_counts",
    "feed_forward",
    "feed_forward_block",
    "feed_forward_layer",
    "grouped_attention",
    "head",
    "instruction_set",
    "instruction_sets",
    "latent_attention",
    "layout",
    "likeliest",
    "limit_experts",
    "linear",
    "log_sums",
    "measure_read_bandwidth",
    "pack",
    "pack_blocks",
    "quantize_blocks",
    "read_weights",
    "rms_norm",
    "route",
    "router",
    "rows",
    "run_decoder",
    "run_head",
    "set_threads",
    "settle",
    "shortlist",
    "stored_bytes",
    "stream_weights",
    "threads",
    "unpacked",
    "unsettled",
    "use_instruction_set",
    "weight_bytes_read",
]
