"""The shape of a model: the fields of the `config.json` that DeepSeek publishes, checked on load.

One class serves every family. `model_type` and the fields switch what the network does; nothing
else does. Fields that other software writes into `config.json` and that the network does not
need are ignored on load.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moescope.errors import UserError
from moescope.files import write_text

ModelType = Literal["deepseek", "deepseek_v2", "deepseek_v3", "llama", "qwen2"]
TopkMethod = Literal[
    "greedy",
    "group_limited_greedy",
    "noaux_tc",
    "relu",
    "expert_choice",
    "sinkhorn",
    "hash",
    "random",
]

Layers = Annotated[int, Field(gt=0, le=1024)]
Count = Annotated[int, Field(gt=0, le=2**14)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Positions = Annotated[int, Field(gt=0, le=2**31)]
Factor = Annotated[float, Field(gt=0, le=1e9)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Ids = Annotated[int, Field(gt=0, le=2**24)]
"""Bounds far above any model: nothing that a damaged config asks for takes forever or overflows."""

ARCHITECTURES: dict[str, str] = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


class RopeScaling(BaseModel):
    """How rotary angles are stretched beyond the trained context (`rope_scaling`)."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    type: Literal["yarn", "linear", "llama3"]
    factor: Factor
    original_max_position_embeddings: Positions | None = None
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    mscale: Weight | None = None
    mscale_all_dim: Weight | None = None
    attention_factor: Weight | None = None
    low_freq_factor: Weight | None = None
    high_freq_factor: Weight | None = None


class ModelConfig(BaseModel):
    """Every size and switch of the network, by DeepSeek's names.

    A family without routed experts (`n_routed_experts` null) is dense. A family without
    `kv_lora_rank` uses grouped-query attention instead of multi-head latent attention.

    `trained_length` is moescope's own: tokens of the rows that the weights were trained on, where
    that is known. A model may accept more (`max_position_embeddings`), but was never shown more.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model_type: ModelType
    vocab_size: Ids
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Size | None = None
    max_position_embeddings: Positions = 4096
    trained_length: Positions | None = None
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    initializer_range: float = Field(default=0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    q_lora_rank: Size | None = None
    kv_lora_rank: Size | None = None
    qk_nope_head_dim: Size | None = None
    qk_rope_head_dim: Size | None = None
    v_head_dim: Size | None = None

    n_routed_experts: Count | None = None
    n_shared_experts: int = Field(default=0, ge=0, le=1024)
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Size | None = None
    moe_layer_freq: int = Field(default=1, gt=0)
    first_k_dense_replace: int = Field(default=0, ge=0)
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: TopkMethod = "greedy"
    n_group: Count | None = None
    topk_group: Count | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=64)

    @property
    def uses_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.uses_mla:
            return self.required("qk_nope_head_dim") + self.required("qk_rope_head_dim")
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the feed-forward part of layer `layer_idx` is a mixture of experts."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def required(self, field: str) -> int:
        """Return an integer field that this family cannot do without.

        Raises:
            UserError: the field is null.
        """
        value = getattr(self, field)
        if value is None:
            raise UserError(f"the model's config lacks `{field}`; add it to config.json")
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_dialects(cls, data: Any) -> Any:
        """Bring what publishers and `transformers` write under DeepSeek's names."""
        if not isinstance(data, dict):
            return data
        fields: dict[str, Any] = {**data}  # pyright: ignore[reportUnknownVariableType]
        for field in ("rope_parameters", "rope_scaling"):
            if not isinstance(fields.get(field) or {}, dict):
                raise ValueError(f"`{field}` is {fields[field]!r}: input should be an object")
        rope: dict[str, Any] = fields.get("rope_parameters") or {}
        if "rope_theta" in rope:
            fields.setdefault("rope_theta", rope["rope_theta"])
        scaling: dict[str, Any] = {**(fields.get("rope_scaling") or rope)}
        kind = scaling.get("type") or scaling.get("rope_type")
        fields["rope_scaling"] = None if kind in (None, "default") else {**scaling, "type": kind}
        if fields.get("model_type") == "deepseek_v3":
            fields.setdefault("scoring_func", "sigmoid")
            fields.setdefault("topk_method", "noaux_tc")
            fields.setdefault("norm_topk_prob", True)
            fields.setdefault("routed_scaling_factor", 2.5)
        if fields.get("model_type") in ("llama", "qwen2", "deepseek"):
            fields["rope_interleave"] = False
        if fields.get("model_type") == "qwen2":
            fields["attention_bias"] = True
        if fields.get("model_type") in ("llama", "qwen2"):
            fields["n_routed_experts"] = None
        if fields.get("n_group") is None and fields.get("topk_method") == "noaux_tc":
            fields["n_group"] = fields["topk_group"] = 1
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        return {name: value for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uses_mla:
            for field in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self.required(field)
        elif self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        rotated = self.qk_rope_head_dim if self.uses_mla else self.qk_head_dim
        if rotated is not None and rotated % 2:
            raise ValueError(f"rotary positions need an even width, not {rotated}")
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)
        return self

    def _check_experts(self, n_routed_experts: int) -> None:
        top_k = self.required("num_experts_per_tok")
        self.required("moe_intermediate_size")
        if top_k > n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {top_k} exceeds n_routed_experts {n_routed_experts}"
            )
        if self.topk_method in ("group_limited_greedy", "noaux_tc"):
            n_group, topk_group = self.required("n_group"), self.required("topk_group")
            if n_routed_experts % n_group:
                raise ValueError(
                    f"n_routed_experts {n_routed_experts} is no multiple of n_group {n_group}"
                )
            if topk_group > n_group:
                raise ValueError(f"topk_group {topk_group} exceeds n_group {n_group}")
            if top_k > topk_group * (n_routed_experts // n_group):
                raise ValueError(
                    f"num_experts_per_tok {top_k} exceeds the experts of topk_group {topk_group}"
                )

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Check `fields`, as read from a `config.json`.

        Raises:
            UserError: a field is missing or wrong; the sentence names it and its value.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(f"{source}: {one_sentence(error)}") from error
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read and check a `config.json`.

        Raises:
            UserError: there is no such file, it is no JSON object, or a field is wrong.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}; name a folder that holds config.json") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} holds no JSON object; a model's config is one")
        return cls.from_dict(fields, str(path))  # pyright: ignore[reportUnknownArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as DeepSeek's `config.json` (and `transformers`) spell them."""
        fields = self.model_dump(exclude_none=True)
        fields["architectures"] = [ARCHITECTURES[self.model_type]]
        # `transformers` gives a null field its default, so absent and null must be told apart.
        fields |= {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id}
        if self.uses_mla:
            fields["q_lora_rank"] = self.q_lora_rank
        return fields

    def save(self, path: Path) -> None:
        """Write `config.json`, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def one_sentence(error: ValidationError) -> str:
    """Say which fields are wrong, with their values, and why."""
    parts: list[str] = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if name and detail["type"] != "missing":
            message = f"`{name}` is {detail['input']!r}: {message[0].lower()}{message[1:]}"
        elif name:
            message = f"`{name}` is missing"
        parts.append(message)
    return "; ".join(parts)
