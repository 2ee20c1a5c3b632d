"""A GGUF file's metadata (arch `deepseek2`) as a `ModelConfig`.

Key names: `gguf-py/gguf/constants.py` of llama.cpp; meanings: its `src/models/deepseek2.cpp`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import read_config
from moescope.formats.gguf.container import TensorInfo, damaged

ARCHITECTURE = "deepseek2"
GATING = {1: "softmax", 2: "sigmoid"}
LOG_MULTIPLIER = 0.1
"""`yarn_log_multiplier` is `mscale_all_dim` times this, so that it multiplies a logarithm."""

IN_LAYER = re.compile(r"blk\.(\d{1,9})\.")

Kind = TypeVar("Kind", int, float, str, bool)


class Fields:
    """Metadata, each value held to the kind that it should be of."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path, self._metadata = path, metadata

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


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]


# --- the shape -----------------------------------------------------------------------------------


def model_config(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> ModelConfig:
    """Return the shape that metadata and the presence of tensors tell.

    Args:
        path: of the file, for messages.
        metadata: its keys and values.
        tensors: of all its parts.

    Raises:
        UserError: the architecture is another one, or a value is missing or has no meaning.
    """
    every = Fields(path, metadata)
    architecture = every.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path} holds a model of the architecture {architecture!r}; of GGUF files moescope "
            f"opens {ARCHITECTURE!r} (DeepSeek-V2, V2-Lite, V3, R1)"
        )
    prefix = f"{ARCHITECTURE}."
    own = Fields(path, {key.removeprefix(prefix): value for key, value in metadata.items()})
    rope = own.get("rope.dimension_count", int)
    # Files before April 2025 give the widths of a head where newer ones give those of a latent.
    key_length = own.find("attention.key_length_mla", int) or own.get("attention.key_length", int)
    value_length = own.find("attention.value_length_mla", int) or own.get(
        "attention.value_length", int
    )
    heads = own.get("attention.head_count", int)
    tokens = metadata.get("tokenizer.ggml.tokens")
    blocks, predicting = own.get("block_count", int), own.get("nextn_predict_layers", int, 0)
    layers = blocks - predicting
    fields: dict[str, Any] = {
        "vocab_size": own.get("vocab_size", int, len(tokens) if isinstance(tokens, list) else 0),
        "hidden_size": own.get("embedding_length", int),
        "intermediate_size": own.get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": own.get("context_length", int),
        "rms_norm_eps": _short(own.get("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(own.get("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(own),
        "tie_word_embeddings": "output.weight" not in tensors,
        "q_lora_rank": own.get("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": own.get("attention.kv_lora_rank", int),
        "qk_nope_head_dim": key_length - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value_length,
        "bos_token_id": every.find("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _ends(every),
        "pad_token_id": every.find("tokenizer.ggml.padding_token_id", int),
        **_experts(path, own, layers, tensors),
    }
    config = read_config(fields, str(path))
    held = {int(found[1]) for name in tensors if (found := IN_LAYER.match(name))}
    if not held.issuperset(range(layers)) or max(held) >= blocks:
        raise damaged(path, f"it announces {blocks} layers and holds {len(held)}")
    return config


def _experts(
    path: Path, own: Fields, layers: int, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return the fields of the mixture, and the family that its router tells.

    Groups of experts are ranked as DeepSeek's code ranks them: without a bias (V2) by their best
    score, where llama.cpp takes the sum of the two best.
    """
    n_routed_experts = own.get("expert_count", int, 0)
    if not n_routed_experts:
        return {"model_type": "deepseek_v2"}
    has_bias = any(name.endswith("exp_probs_b.bias") for name in tensors)
    gating = own.get("expert_gating_func", int, 2 if has_bias else 1)
    if own.find("attention.temperature_scale", float):
        raise UserError(f"{path}: attention is scaled by position, which moescope does not know")
    if gating not in GATING:
        raise UserError(
            f"{path}: the router scores experts by the rule number {gating}, which moescope does "
            f"not know; it knows {', '.join(GATING.values())}"
        )
    n_group, topk_group = (
        own.find("expert_group_count", int),
        own.find("expert_group_used_count", int),
    )
    limited = "group_limited_greedy" if (n_group or 1) > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if has_bias else "deepseek_v2",
        "n_routed_experts": n_routed_experts,
        "n_shared_experts": own.get("expert_shared_count", int, 0),
        "num_experts_per_tok": own.get("expert_used_count", int),
        "moe_intermediate_size": own.get("expert_feed_forward_length", int),
        "first_k_dense_replace": own.get("leading_dense_block_count", int, 0),
        "scoring_func": GATING[gating],
        "topk_method": "noaux_tc" if has_bias else limited,
        "n_group": n_group or None,
        "topk_group": topk_group or None,
        "norm_topk_prob": own.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": _short(own.get("expert_weights_scale", float, 1.0)) or 1.0,
    }


def _rope_scaling(own: Fields) -> dict[str, Any] | None:
    """Return YaRN's or linear stretching.

    A file keeps `mscale_all_dim` and not `mscale`; in all published models the two are equal, and
    llama.cpp takes them to be.
    """
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
        }
    return scaling


def _ends(every: Fields) -> int | list[int] | None:
    """Return the ids that end a text: of the whole, and of a turn where that is another."""
    found = {every.find(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")}
    ids = sorted(token_id for token_id in found if token_id is not None)
    return ids if len(ids) > 1 else next(iter(ids), None)


def _short(value: float) -> float:
    """Return the decimal number that was written, of which a file keeps 32 bits."""
    return float(f"{value:.7g}")
