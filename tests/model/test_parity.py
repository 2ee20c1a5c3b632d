"""The network against `transformers`, on small random checkpoints in float32.

For each variant: logits of a whole text, of the same text fed to a cache piece by piece, and of
our own saved copy opened by `transformers`. The figures are printed as a table at the end of the
test run. DeepSeekMoE (`deepseek`), which `transformers` lacks, is held to a plain float64 loop
over tokens and experts, written from the paper.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_models import LATENT, VARIANTS, published
from torch import Tensor
from transformers import AutoModelForCausalLM

from moescope.checkpoint import load_model, save_weights
from moescope.families import read_config
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM, initialise

TOLERANCE = 1e-4
BATCH, SEQ, PREFILLED = 2, 23, 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    variant: str, tmp_path: Path, record_property: Any
) -> None:
    theirs = published(VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    input_ids = some_ids()
    with torch.inference_mode():
        expected = theirs(input_ids).logits
        save_weights(ours, tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        differences = (
            difference(ours.logits(ours(input_ids)), expected),
            difference(decoded(ours, input_ids), expected),
            difference(again(input_ids).logits, expected),
        )
    record_property("parity", (variant, *differences))
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_of_deepseek_moe_are_the_papers(norm_topk_prob: bool, record_property: Any) -> None:
    fields = {
        **{name: value for name, value in LATENT.items() if name != "kv_lora_rank"},
        "model_type": "deepseek",
        "norm_topk_prob": norm_topk_prob,
    }
    ours = CausalLM(read_config(fields)).eval()
    initialise(ours, seed=0)
    input_ids = some_ids()
    weights = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    with torch.inference_mode():
        expected = torch.stack([deepseek_moe(weights, row, norm_topk_prob) for row in input_ids])
        differences = (
            difference(ours.logits(ours(input_ids)), expected),
            difference(decoded(ours, input_ids), expected),
        )
    variant = "deepseek, normalised weights" if norm_topk_prob else "deepseek"
    record_property("parity", (variant, *differences, None))
    assert max(differences) <= TOLERANCE


def some_ids() -> Tensor:
    return torch.randint(97, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


def decoded(model: CausalLM, input_ids: Tensor) -> Tensor:
    """Logits of a text whose beginning is read at once, and the rest token by token."""
    cache, positions = Cache(), torch.arange(SEQ).expand(BATCH, -1)
    bounds = [0, *range(PREFILLED, SEQ + 1)]
    return torch.cat(
        [
            model.logits(model(input_ids[:, a:b], positions[:, a:b], cache))
            for a, b in itertools.pairwise(bounds)
        ],
        dim=1,
    )


def deepseek_moe(weights: dict[str, Tensor], ids: Tensor, norm_topk_prob: bool) -> Tensor:
    """DeepSeekMoE-16B for one sequence (Dai et al. 2024, eq. 1-5 and 9-11), a step at a time."""
    heads, width, top_k = 4, 48 // 4, 3
    angles = torch.arange(len(ids)).double()[:, None] * 10000.0 ** (
        -torch.arange(0, width, 2).double() / width
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # (seq, width)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.split(width // 2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ (F.silu(gate @ x) * (up @ x))

    def block(x: Tensor, name: str) -> Tensor:
        return swiglu(
            x, *(weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        )

    def mixture(x: Tensor, name: str) -> Tensor:
        scores = (weights[f"{name}.gate.weight"] @ x).softmax(dim=0)
        chosen = scores.argsort(descending=True)[:top_k].tolist()
        total = sum(scores[e] for e in chosen) if norm_topk_prob else 1.0
        output = block(x, f"{name}.shared_experts")
        for expert in chosen:
            gate, up = weights[f"{name}.experts.gate_up_proj"][expert].split(20)
            down = weights[f"{name}.experts.down_proj"][expert]
            output = output + scores[expert] / total * swiglu(x, gate, up, down)
        return output

    stream = weights["model.embed_tokens.weight"][ids]
    for layer in range(3):
        name = f"model.layers.{layer}"
        normed = norm(stream, f"{name}.input_layernorm")
        query, key, value = (
            (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T).view(-1, heads, width)
            for part in "qkv"
        )
        mixed = torch.zeros_like(stream)
        for head in range(heads):
            q, k = rotated(query[:, head]), rotated(key[:, head])
            for at in range(len(ids)):
                shares = (k[: at + 1] @ q[at] / width**0.5).softmax(dim=0)
                mixed[at, head * width : (head + 1) * width] = shares @ value[: at + 1, head]
        stream = stream + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
        normed = norm(stream, f"{name}.post_attention_layernorm")
        feed_forward = mixture if layer else block
        stream = stream + torch.stack([feed_forward(x, f"{name}.mlp") for x in normed])
    return norm(stream, "model.norm") @ weights["lm_head.weight"].T
