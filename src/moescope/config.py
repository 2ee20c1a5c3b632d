"""The shape of a model: what the network can be switched to, by DeepSeek's names.

One class serves every family, and its fields alone switch what the network does. How each family
spells them in its `config.json` is in `families/`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moescope.errors import UserError

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

LayerType = Literal[
    "full_attention",
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
]

Layers = Annotated[int, Field(gt=0, le=1024)]
Count = Annotated[int, Field(gt=0, le=2**14)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Positions = Annotated[int, Field(gt=0, le=2**31)]
Factor = Annotated[float, Field(gt=0, le=1e9)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Ids = Annotated[int, Field(gt=0, le=2**24)]
"""Bounds far above any model: nothing that a damaged config asks for takes forever or overflows."""


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
    truncate: bool = True
    attention_factor: Weight | None = None
    low_freq_factor: Weight | None = None
    high_freq_factor: Weight | None = None


class ModelConfig(BaseModel):
    """Every size and switch of the network, by DeepSeek's names.

    A model without routed experts (`n_routed_experts` null) is dense. One without `kv_lora_rank`
    uses grouped-query attention instead of multi-head latent attention.

    Attributes:
        trained_length: tokens of the rows that the weights were trained on, where that is known
            (moescope's own field). A model may accept more (`max_position_embeddings`), but was
            never shown more.
        partial_rotary_factor: share of a grouped-query head that is rotated, from its front.
        attention_bias: biases of the projections into attention.
        attention_out_bias: a bias of `o_proj`; None means as `attention_bias`.
        attention_sinks: a learned logit a head that joins the softmax and takes no value.
        qk_norm: RMSNorm of queries and keys before the rotation: of each `head`, or of the `full`
            width at once.
        clip_qkv: bound on the magnitude of queries, keys and values.
        sliding_window: slots that a query sees, its own included, in the layers that
            `layer_types` calls `sliding_attention`; in all of them where that is null.
        attention_multiplier: of the attention logits, instead of `qk_head_dim ** -0.5`.
        embedding_multiplier: of what the embedding hands on.
        residual_multiplier: of what attention and feed-forward part add.
        logits_scaling: by which logits are divided.
        mlp_layer_types: `dense` or `sparse` for each layer; overrides `first_k_dense_replace` and
            `moe_layer_freq`.
        expert_act: `silu` is `silu(gate) * up`; `swigluoai` is gpt-oss's
            `gate * sigmoid(1.702 * gate) * (up + 1)`.
        expert_bias: biases of the routed experts' three matrices.
        swiglu_limit: bounds `gate` from above and `up` from both sides before they meet.
        index_topk: earlier tokens that a query sees, picked by an indexer of `index_n_heads` heads
            of the width `index_head_dim` (DeepSeek-V3.2).
        indexer_types: for each layer, whether it has an indexer (`full`) or takes over what the
            last one picked (`shared`, GLM-5); all have one where it is null.
        indexer_rope_interleave: whether an indexer's rotated pairs are neighbours.
        compress_rates: tokens that become one entry, for the two compressed `layer_types` of
            DeepSeek-V4; not null makes all layers that model's (`model/compressed_attention.py`),
            with one shared head of keys and values of the width `head_dim`.
        compress_rope_theta: of layers with entries; `rope_scaling` is theirs alone.
        o_groups: groups of heads that are mapped to `o_lora_rank` numbers each, then together.
        hc_mult: streams of the residual (`model/hyper_connections.py`); null means a plain one.
        hc_sinkhorn_iters: by which their mixing matrices are made doubly stochastic.
        num_hash_layers: first layers whose experts a table gives by the token's id.
        router_bias: a bias of the map that scores experts.
        softmax_after_topk: weights are a softmax over the chosen logits alone.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model_type: str
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
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_sinks: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: Factor | None = None
    sliding_window: Positions | None = None
    layer_types: tuple[LayerType, ...] | None = None
    attention_multiplier: Factor | None = None
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0
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

    index_n_heads: Count | None = None
    index_head_dim: Size | None = None
    index_topk: Positions | None = None
    indexer_types: tuple[Literal["full", "shared"], ...] | None = None
    indexer_rope_interleave: bool = False

    compress_rates: dict[LayerType, Count] | None = None
    compress_rope_theta: float = Field(default=160000.0, gt=1)
    o_groups: Count | None = None
    o_lora_rank: Size | None = None
    hc_mult: Annotated[int, Field(gt=0, le=64)] | None = None
    hc_sinkhorn_iters: Annotated[int, Field(gt=0, le=1024)] = 20
    hc_eps: float = Field(default=1e-6, gt=0)

    n_routed_experts: Count | None = None
    n_shared_experts: int = Field(default=0, ge=0, le=1024)
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Size | None = None
    moe_layer_freq: int = Field(default=1, gt=0)
    first_k_dense_replace: int = Field(default=0, ge=0)
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    expert_act: Literal["silu", "swigluoai"] = "silu"
    expert_bias: bool = False
    swiglu_limit: Factor | None = None
    num_hash_layers: int = Field(default=0, ge=0)
    router_bias: bool = False
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    softmax_after_topk: bool = False
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

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query or key head are rotated."""
        if self.uses_mla:
            return self.required("qk_rope_head_dim")
        return int(self.qk_head_dim * self.partial_rotary_factor)

    def window_of(self, layer_idx: int) -> int | None:
        """How many slots a query of a layer sees, its own included; None for all."""
        if self.layer_types is not None and self.layer_types[layer_idx] == "full_attention":
            return None
        return self.sliding_window

    def layer_type_of(self, layer_idx: int) -> str:
        """What attention of a layer is; full attention where nothing is said."""
        return "full_attention" if self.layer_types is None else self.layer_types[layer_idx]

    def compress_rate_of(self, layer_idx: int) -> int | None:
        """Tokens that a layer of DeepSeek-V4 joins into one entry; None if it has the window."""
        kind = self.layer_type_of(layer_idx)
        return {str(name): rate for name, rate in (self.compress_rates or {}).items()}.get(kind)

    def has_indexer(self, layer_idx: int) -> bool:
        """Whether latent attention of a layer picks the tokens that it sees by itself."""
        if self.index_topk is None:
            return False
        types = self.indexer_types
        return types is None or layer_idx >= len(types) or types[layer_idx] == "full"

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the feed-forward part of layer `layer_idx` is a mixture of experts."""
        if self.mlp_layer_types is not None and layer_idx < len(self.mlp_layer_types):
            return self.mlp_layer_types[layer_idx] == "sparse"
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
        if self.rotary_dim % 2:
            raise ValueError(f"rotary positions need an even width, not {self.rotary_dim}")
        for field in ("layer_types", "mlp_layer_types", "indexer_types"):
            types = getattr(self, field)
            if types is not None and len(types) != self.num_hidden_layers:
                raise ValueError(
                    f"{field} names {len(types)} layers, but num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
        if self.layer_types and "sliding_attention" in self.layer_types:
            self.required("sliding_window")
        if self.index_topk is not None:
            self._check_indexer()
        if self.compress_rates is not None:
            self._check_compression(self.compress_rates)
        elif self.layer_types and any("compressed" in kind for kind in self.layer_types):
            self.required("compress_rates")
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)
        return self

    def _check_indexer(self) -> None:
        width = self.required("index_head_dim")
        for field in ("index_n_heads", "q_lora_rank"):
            self.required(field)
        if width < self.rotary_dim:
            raise ValueError(
                f"index_head_dim {width} is less than the {self.rotary_dim} that are rotated"
            )
        if self.indexer_types and self.indexer_types[0] == "shared":
            raise ValueError("indexer_types has no `full` layer before the first `shared` one")

    def _check_compression(self, rates: dict[LayerType, int]) -> None:
        for field in ("layer_types", "sliding_window", "q_lora_rank", "o_groups", "o_lora_rank"):
            if getattr(self, field) is None:
                self.required(field)
        compressed = {kind for kind in self.layer_types or () if "compressed" in kind}
        if missing := sorted(compressed - set(rates)):
            raise ValueError(f"compress_rates lacks {missing[0]}")
        if "compressed_sparse_attention" in compressed:
            self.required("index_topk")
        if self.num_attention_heads % self.required("o_groups"):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of o_groups "
                f"{self.o_groups}"
            )

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


def checked(fields: dict[str, Any], source: str) -> ModelConfig:
    """Check fields by the names of `ModelConfig`.

    Args:
        fields: what a family's dialect was read into.
        source: where they stand, for the message.

    Raises:
        UserError: a field is missing or wrong; the sentence names it and its value.
    """
    try:
        return ModelConfig.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
    except ValidationError as error:
        lacks_it = any(detail["type"] == "literal_error" for detail in error.errors())
        way_out = "; moescope does not compute this, so choose another model" if lacks_it else ""
        raise UserError(f"{source}: {one_sentence(error)}{way_out}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


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
