"""A GGUF file's metadata as a `ModelConfig`, and back.

What all architectures have in common is here; what one alone has is in its family
(`families`, `Gguf`). Key names: `gguf-py/gguf/constants.py` of llama.cpp.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moescope.config import ModelConfig, RopeScaling, checked
from moescope.errors import UserError
from moescope.families import ARCHITECTURES, FAMILIES
from moescope.families.dialect import layer_types
from moescope.families.family import Gguf
from moescope.formats.gguf.container import TensorInfo, damaged
from moescope.formats.gguf.llama3 import llama3_scaling

GATING = {1: "softmax", 2: "sigmoid"}
LOG_MULTIPLIER = 0.1
"""`yarn_log_multiplier` is `mscale_all_dim` times this, so that it multiplies a logarithm."""

MAX_LAYERS = 1024
"""Far above any model: nothing that a damaged file announces takes long."""

IN_LAYER = re.compile(r"blk\.(\d{1,9})\.")

Kind = TypeVar("Kind", int, float, str, bool)


class Fields:
    """Metadata, each value held to the kind that it should be of."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Collection[str] = ()
    ) -> None:
        self._path, self._metadata, self._tensors = path, metadata, tensors

    def get(self, key: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """Return a value, or `default` where the key is not there.

        Raises:
            UserError: the value is of another kind, or the key is missing and has no default.
        """
        value = self.find(key, kind)
        if value is not None:
            return value
        if default is None:
            raise damaged(self._path, f"it lacks the key {key}")
        return default

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """Return a value, or None where the key is not there."""
        value = self._metadata.get(key)
        if value is not None and type(value) is not kind:
            raise damaged(self._path, f"{key} is {_shown(value)}, no {kind.__name__}")
        return value

    def items(self, key: str, kind: type[Kind]) -> list[Kind]:
        """Return an array.

        Raises:
            UserError: it is missing, no array, or one of another kind.
        """
        value = self._metadata.get(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise damaged(self._path, f"it lacks the list {key} of {kind.__name__}")
        return value

    def find_items(self, key: str, kind: type[Kind]) -> list[Kind]:
        """Return an array, an empty one where the key is not there."""
        return self.items(key, kind) if key in self._metadata else []

    def sizes(self, key: str, default: int | None = None) -> int:
        """Return a number that may be listed layer by layer.

        Raises:
            UserError: it is missing, or differs from layer to layer.
        """
        value = self._metadata.get(key)
        if not isinstance(value, list):
            return self.get(key, int, default)
        different = sorted({item for item in self.items(key, int) if item})
        if len(different) != 1:
            raise UserError(
                f"{self._path}: {key} is another in some layers ({different[:4]}), which moescope "
                "does not compute"
            )
        return different[0]

    def holds(self, ending: str) -> bool:
        """Whether the file has a tensor whose name ends so."""
        return any(name.endswith(ending) for name in self._tensors)


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]


# --- the shape -----------------------------------------------------------------------------------


def model_config(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rope_factors: list[float] | None = None,
) -> ModelConfig:
    """Return the shape that metadata and the presence of tensors tell.

    Args:
        path: of the file, for messages.
        metadata: its keys and values.
        tensors: of all its parts.
        rope_factors: of `rope_freqs.weight`, by which rotary frequencies are divided.

    Raises:
        UserError: the architecture is unknown, or a value is missing or has no meaning.
    """
    every = Fields(path, metadata)
    architecture = every.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of the architecture {architecture[:40]!r}; of GGUF files "
            f"moescope opens {', '.join(ARCHITECTURES)}"
        )
    gguf = ARCHITECTURES[architecture]
    prefix = f"{architecture}."
    own_keys = {key.removeprefix(prefix): value for key, value in metadata.items()}
    own = Fields(path, own_keys, tensors)
    if own.find("attention.temperature_scale", float):
        raise UserError(f"{path}: attention is scaled by position, which moescope does not know")
    tokens = metadata.get("tokenizer.ggml.tokens")
    blocks, predicting = own.get("block_count", int), own.get("nextn_predict_layers", int, 0)
    layers = blocks - predicting
    if not 0 < layers <= MAX_LAYERS or not 0 <= predicting <= blocks:
        raise damaged(path, f"it announces {blocks} layers, {predicting} of them to predict more")
    heads = own.sizes("attention.head_count")
    hidden = own.get("embedding_length", int)
    head_dim = own.get("attention.key_length", int, hidden // max(heads, 1))
    fields: dict[str, Any] = {
        "vocab_size": own.get("vocab_size", int, len(tokens) if isinstance(tokens, list) else 0),
        "hidden_size": hidden,
        "intermediate_size": own.sizes(
            "feed_forward_length", own.find("expert_feed_forward_length", int)
        ),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own.sizes("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": own.get("rope.dimension_count", int, head_dim) / max(head_dim, 1),
        "max_position_embeddings": own.get("context_length", int),
        "rms_norm_eps": _short(own.get("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(own.get("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(path, own, gguf, rope_factors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": every.find("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _ends(every),
        "pad_token_id": every.find("tokenizer.ggml.padding_token_id", int),
        **gguf.read(own),
        **_experts(path, own, layers, tensors),
    }
    if "kv_lora_rank" in fields:
        fields["partial_rotary_factor"] = 1.0
    if fields.get("topk_method") == "noaux_tc" and not fields.get("n_group"):
        fields["n_group"] = fields["topk_group"] = 1
    config = checked(fields, str(path))
    held = {int(found[1]) for name in tensors if (found := IN_LAYER.match(name))}
    if not held.issuperset(range(layers)) or max(held) >= blocks:
        raise damaged(path, f"it announces {blocks} layers and holds {len(held)}")
    return config


def _experts(
    path: Path, own: Fields, layers: int, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return the fields of the mixture; a layer without a router is dense."""
    n_routed_experts = own.get("expert_count", int, 0)
    if not n_routed_experts:
        return {}
    gating = own.find("expert_gating_func", int)
    if gating is not None and gating not in GATING:
        raise UserError(
            f"{path}: the router scores experts by the rule number {gating}, which moescope does "
            f"not know; it knows {', '.join(GATING.values())}"
        )
    told = {
        "scoring_func": None if gating is None else GATING[gating],
        "moe_intermediate_size": own.find("expert_feed_forward_length", int),
        "n_group": own.find("expert_group_count", int) or None,
        "topk_group": own.find("expert_group_used_count", int) or None,
        "norm_topk_prob": own.find("expert_weights_norm", bool),
    }
    found = {name: value for name, value in told.items() if value is not None}
    dense = [f"blk.{layer}.ffn_gate_inp.weight" not in tensors for layer in range(layers)]
    return found | {
        "n_routed_experts": n_routed_experts,
        "n_shared_experts": own.get("expert_shared_count", int, 0),
        "num_experts_per_tok": own.get("expert_used_count", int),
        "routed_scaling_factor": _short(own.get("expert_weights_scale", float, 1.0)) or 1.0,
        **layer_types(dense),
    }


def _rope_scaling(
    path: Path, own: Fields, gguf: Gguf, rope_factors: list[float] | None
) -> dict[str, Any] | None:
    """Return YaRN's, Llama 3's or linear stretching.

    A file keeps `mscale_all_dim` and not `mscale`; in all published models the two are equal, and
    llama.cpp takes them to be. Of Llama 3's it keeps the factors alone.
    """
    if rope_factors is not None:
        theta = own.get("rope.freq_base", float, 10000.0)
        trained = own.find("rope.scaling.original_context_length", int)
        return llama3_scaling(path, rope_factors, theta, trained)
    kind = own.get("rope.scaling.type", str, "linear")
    if kind == "none" or (kind == "linear" and own.find("rope.scaling.factor", float) is None):
        return None
    scaling: dict[str, Any] = {
        "type": kind,
        "factor": _short(own.get("rope.scaling.factor", float)),
    }
    if kind == "yarn":
        multiplier = own.find("rope.scaling.yarn_log_multiplier", float)
        mscale = None if multiplier is None else _short(multiplier / LOG_MULTIPLIER)
        scaling |= {
            "original_max_position_embeddings": own.find(
                "rope.scaling.original_context_length", int
            ),
            "beta_fast": _short(own.get("rope.scaling.yarn_beta_fast", float, 32.0)),
            "beta_slow": _short(own.get("rope.scaling.yarn_beta_slow", float, 1.0)),
            "mscale": mscale,
            "mscale_all_dim": mscale,
            **gguf.rope_scaling,
        }
    return scaling


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """Return a config under llama.cpp's keys, the architecture's name in front of each.

    Raises:
        UserError: llama.cpp has no architecture for the family.
    """
    gguf = architecture_of(config)
    scaling = config.rope_scaling
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.qk_head_dim,
        "attention.value_length": config.qk_head_dim,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        **({} if scaling is None or scaling.type == "llama3" else _scaling_keys(config, scaling)),
        **({} if config.n_routed_experts is None else _expert_keys(config)),
        **gguf.write(config),
    }
    return {f"{gguf.architecture}.{key}": value for key, value in keys.items()}


def _scaling_keys(config: ModelConfig, scaling: RopeScaling) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "rope.scaling.type": scaling.type,
        "rope.scaling.factor": float(scaling.factor),
    }
    if scaling.type != "yarn":
        return keys
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    keys |= {
        "rope.scaling.original_context_length": trained,
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }
    if scaling.mscale_all_dim is not None:
        keys["rope.scaling.yarn_log_multiplier"] = LOG_MULTIPLIER * scaling.mscale_all_dim
    return keys


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    gating = {name: number for number, name in GATING.items()}
    keys: dict[str, Any] = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.required("num_experts_per_tok"),
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.required("moe_intermediate_size"),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": gating.get(config.scoring_func, 1),
    }
    if config.n_group is not None and config.topk_group is not None:
        keys |= {
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    return keys


NOT_IN_GGUF = ("relu", "expert_choice", "hash")
"""Routers of which llama.cpp knows nothing; what Sinkhorn's and a random map choose is greedy."""


def architecture_of(config: ModelConfig) -> Gguf:
    """Return how llama.cpp keeps a config's family.

    Raises:
        UserError: it does not.
    """
    gguf = FAMILIES[config.model_type].gguf
    if gguf is None:
        raise UserError(
            f"a {config.model_type} model has no architecture in GGUF; save it as safetensors"
        )
    if config.n_routed_experts is not None and config.topk_method in NOT_IN_GGUF:
        raise UserError(
            f"GGUF has no words for a router of the kind {config.topk_method}, and llama.cpp would "
            "compute another model; save it as safetensors, which moescope opens"
        )
    return gguf


def _ends(every: Fields) -> int | list[int] | None:
    """Return the ids that end a text: of the whole, and of a turn where that is another."""
    found = {every.find(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")}
    ids = sorted(token_id for token_id in found if token_id is not None)
    return ids if len(ids) > 1 else next(iter(ids), None)


def _short(value: float) -> float:
    """Return the decimal number that was written, of which a file keeps 32 bits."""
    return float(f"{value:.7g}")
