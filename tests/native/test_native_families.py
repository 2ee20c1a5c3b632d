"""Every family on the native kernels against `transformers`, whose weights bf16 holds exactly."""

import itertools
from pathlib import Path

import pytest
import torch
from family_models import VARIANTS, published
from packing import expert_reader
from torch import Tensor

from moescope.checkpoint import load_model
from moescope.kernels import cpu
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.model.steering import Steering, moe_layers, steered
from moescope.native.decoder import NativeDecoder
from moescope.native.network import Packer

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)

BATCH, SEQ, PREFILLED, CHUNK = 2, 33, 9, 20
IDS = torch.randint(97, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def in_parts(model: CausalLM) -> Tensor:
    """Logits of a text that is read in two chunks and then token by token."""
    cache, positions = Cache(), torch.arange(SEQ).expand(BATCH, -1)
    bounds = [0, PREFILLED, CHUNK, *range(CHUNK + 1, SEQ + 1)]
    parts = [model(IDS[:, a:b], positions[:, a:b], cache) for a, b in itertools.pairwise(bounds)]
    return model.logits(torch.cat(parts, dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_native_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    theirs = published(VARIANTS[variant])
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    theirs.save_pretrained(tmp_path)
    expected = theirs(IDS).logits
    native, plain = load_model(tmp_path).eval(), load_model(tmp_path).eval()
    weights = dict(plain.state_dict())
    Packer("bf16").pack(native, weights.__getitem__, expert_reader(weights))
    in_one_call = native.config.index_topk is None  # an indexer is PyTorch's
    assert isinstance(native.model, NativeDecoder)
    assert (native.model.all_layers is not None) == in_one_call
    close(native.logits(native(IDS)), expected)
    close(in_parts(native), expected)

    if layers := list(moe_layers(native)):
        steering = Steering(
            num_experts_per_tok=2,
            bias={(layers[0], 1): 0.3},
            disabled=[(layers[-1], 0), (layers[-1], 5)],
            forced=[(layers[-1], 2)],
        )
        other = steered(native, steering)
        expected = plain.logits(steered(plain, steering)(IDS))
        close(in_parts(other), expected)
        assert isinstance(other.model, NativeDecoder)
        assert (other.model.all_layers is not None) == in_one_call
