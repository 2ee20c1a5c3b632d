"""The families: how each spells its config and its tensors. Nothing here computes.

To add one: a file with its `Family`, its line in `FAMILIES`, its line in `tests/families`.
"""

import json
from pathlib import Path
from typing import Any, cast, get_args

import torch

from moescope.config import LayerType, ModelConfig, checked
from moescope.errors import UserError
from moescope.families import (
    deepseek,
    deepseek_v4,
    deepseek_v32,
    dots,
    ernie,
    glm,
    gpt_oss,
    granite,
    llama,
    minimax,
    mixtral,
    olmoe,
    qwen,
)
from moescope.families.dialect import common
from moescope.families.family import Family, Fields, Gguf
from moescope.files import write_text

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        deepseek.DEEPSEEK,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        deepseek_v32.DEEPSEEK_V32,
        deepseek_v4.DEEPSEEK_V4,
        deepseek.GLM4_MOE_LITE,
        deepseek.KIMI_K2,
        deepseek.JOYAI_LLM_FLASH,
        llama.LLAMA,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        olmoe.OLMOE,
        mixtral.MIXTRAL,
        granite.GRANITEMOE,
        glm.GLM4_MOE,
        dots.DOTS1,
        deepseek_v32.GLM_MOE_DSA,
        ernie.ERNIE4_5_MOE,
        gpt_oss.GPT_OSS,
        minimax.MINIMAX_M2,
    )
}

ARCHITECTURES: dict[str, Gguf] = {
    family.gguf.architecture: family.gguf for family in FAMILIES.values() if family.gguf is not None
}
"""By llama.cpp's name."""

OWN = "moescope"
"""The `model_type` of a model that no family's software computes as it was trained.

`transformers`, vLLM and llama.cpp refuse it; under the family's own name they would open it and be
silently wrong.
"""
ROUTER_FIELDS = (
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_experts_per_tok",
    "softmax_after_topk",
)

LACKING = {
    "qwen3_next": "Gated DeltaNet",
    "qwen3_5_moe": "Gated DeltaNet",
    "qwen3_5_moe_text": "Gated DeltaNet",
    "qwen3_5": "Gated DeltaNet",
    "qwen3_5_text": "Gated DeltaNet",
    "kimi_linear": "Kimi Delta Attention",
    "granitemoehybrid": "Mamba-2",
}
"""Families with layers of a kind that the network does not have, and its name."""

KNOWN_LAYERS = (
    *get_args(LayerType),
    *("attention", "indexed_attention", "deepseek_sparse_attention"),  # what each family has anyway
)
"""What `layer_types` may say."""


def read_config(fields: Fields, source: str = "config.json") -> ModelConfig:
    """Read a family's dialect: the fields of a `config.json`, as publishers or transformers write.

    Args:
        fields: the model's own, or those of a larger model with a `text_config`.
        source: where they stand, for messages.

    Raises:
        UserError: the family is unknown or has parts that the network lacks, or a field is
            missing or wrong; the sentence names it and its value.
    """
    inner = fields.get("text_config")
    if isinstance(inner, dict) and str(fields.get("model_type")) not in FAMILIES:
        fields = cast(Fields, inner)
    model_type = fields.get("model_type")
    is_own = model_type == OWN
    if is_own:
        model_type = fields.get("family")
    lacking = _lacking(str(model_type), fields)
    if lacking is not None:
        raise UserError(f"{source}: {lacking}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        said = "is missing" if model_type is None else f"is {str(model_type)[:40]!r}"
        raise UserError(f"{source}: `model_type` {said}; moescope opens {', '.join(FAMILIES)}")
    if is_own:
        return checked({**fields, "model_type": model_type}, source)
    try:
        read = FAMILIES[model_type].read(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: {error}") from error
    return checked(read, source)


def _lacking(model_type: str, fields: Fields) -> str | None:
    """Say which layers are of a kind that the network does not have."""
    types: list[Any] = fields.get("layer_types") or []
    if model_type in LACKING:
        step = fields.get("full_attention_interval")
        if not types and isinstance(step, int):
            numbers = range(1, 1 + (fields.get("num_hidden_layers") or 0))
            types = ["linear" if number % (step or 1) else "full" for number in numbers]
        kind = LACKING[model_type]
        found = [str(layer) for layer, said in enumerate(types) if "full" not in str(said)]
    elif model_type in FAMILIES:
        kind = next((said for said in types if said not in KNOWN_LAYERS), None)
        found = [str(layer) for layer, said in enumerate(types) if said == kind]
    else:
        return None
    if kind is None:
        return None
    layers = f"layers {', '.join(found[:8])}{', ...' if found[8:] else ''}" if found else "layers"
    return (
        f"{layers} of this {model_type} model are {str(kind)[:40]}, which moescope does not "
        "compute; choose a model of another family"
    )


def open_config(path: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        UserError: there is no such file, it is no JSON object, or as `read_config`.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; name a folder that holds config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no JSON object; a model's config is one")
    return read_config(cast(Fields, fields), str(path))


def config_fields(config: ModelConfig) -> Fields:
    """Return a config as its family's `config.json` spells it, for `transformers` and others.

    Where others would route otherwise than the model was trained to, it is moescope's own
    dialect, which they refuse.
    """
    fields = _in_dialect(config)
    if others_route_alike(config):
        return fields
    own = config.model_dump(mode="json", exclude_none=True)
    named = {"model_type": OWN, "family": config.model_type}
    return own | named | {"architectures": ["MoescopeForCausalLM"]}


def others_route_alike(config: ModelConfig) -> bool:
    """Whether others that open the family choose and weigh experts as the config says."""
    if config.n_routed_experts is None:
        return True
    family = FAMILIES[config.model_type]
    read = checked(family.read(_in_dialect(config)), "config.json")
    told = all(getattr(read, name) == getattr(config, name) for name in ROUTER_FIELDS)
    return told and family.routes(config)


def _in_dialect(config: ModelConfig) -> Fields:
    family = FAMILIES[config.model_type]
    named = {"model_type": family.model_type, "architectures": [family.architecture]}
    return common(config) | family.write(config) | named


def save_config(config: ModelConfig, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json`, atomically; others compute in `dtype` where it is told."""
    fields = config_fields(config)
    if dtype is not None:
        fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
