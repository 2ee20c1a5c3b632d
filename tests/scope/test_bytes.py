"""What a trace says a token reads is what the kernels count when it is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moescope
from moescope.api import Model
from moescope.checkpoint import save_weights
from moescope.families import config_fields, read_config
from moescope.kernels import cpu
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.bytes import WeightBytes
from moescope.scope.recording import TraceRecorder

TEXT = "床前明月光 the moon before my bed"


def test_by_hand_on_a_network_that_is_not_packed(model: Model) -> None:
    """Float32: matrices of attention, dense and shared parts, head, and 3 experts of 8 a layer."""
    rank, rope, nope, value, heads, hidden = 16, 4, 8, 8, 2, 32
    attention = hidden * (heads * (nope + rope) + rank + rope)
    attention += rank * heads * (nope + value) + heads * value * hidden
    dense, expert, head = 3 * hidden * 48, 3 * hidden * 16, 300 * hidden
    expected = 4 * (3 * attention + dense + 2 * (1 + 3) * expert + head)
    assert {token.weight_bytes for token in model.trace(TEXT).tokens} == {expected}


RELU = "a router that is free in how many it takes"
VARIANTS: dict[str, dict[str, Any]] = {
    "V3": {},
    "V3, low-rank queries": {"q_lora_rank": 24},
    "V2": {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
    RELU: {"topk_method": "relu"},
    "no shared experts": {"n_shared_experts": 0},
    "DeepSeekMoE": {
        "model_type": "deepseek",
        "kv_lora_rank": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
}


@pytest.mark.skipif(not cpu.available(), reason="the extension is not built")
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_count_what_the_routing_says(
    variant: str, weight_format: str, model: Model, tmp_path: Path
) -> None:
    fields = config_fields(model.config) | {"num_experts_per_tok": 2} | VARIANTS[variant]
    network = CausalLM(read_config(fields))
    initialise(network, seed=1)
    save_weights(network, tmp_path)
    model.tokenizer.save(tmp_path)
    packed = moescope.load(tmp_path, quantize=weight_format)
    ids = packed.engine.encode(TEXT)
    said, counted = [], []
    for recorder in (TraceRecorder(), None):
        cache = Cache()
        for position, token_id in enumerate(ids):
            before = cpu.weight_bytes_read()
            read(packed.network, token_id, position, cache, recorder)
            counted.append(cpu.weight_bytes_read() - before)
            if recorder is not None:
                said += WeightBytes.of(packed.network).read(recorder.routings, 1).tolist()
    looked_on, unseen = counted[: len(ids)], counted[len(ids) :]
    assert looked_on == said
    traced = [token.weight_bytes for token in packed.trace(TEXT).tokens]
    if variant == RELU:  # how many experts is a matter of rounding, too
        assert len(set(said)) > 1
        assert sum(unseen) == pytest.approx(sum(traced), rel=0.05)
    else:
        assert unseen == traced == said


@torch.inference_mode()
def read(
    network: CausalLM, token_id: int, position: int, cache: Cache, recorder: TraceRecorder | None
) -> None:
    """Read one token by itself, and say what comes next."""
    places = torch.tensor([[position]])
    network.logits(network(torch.tensor([[token_id]]), places, cache, recorder))
