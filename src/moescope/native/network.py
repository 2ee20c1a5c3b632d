"""A network whose weights are packed for the native CPU kernels.

The network's definition stays the one in `model/`: modules are replaced by ones of the same kind
that hold packed weights and call `kernels.cpu`. Router, norms and scores stay float32; the
embedding keeps its type. Without the extension, weights are rounded all the same, and PyTorch
computes with them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.catalog import count_parameters
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.kernels.blocks import Blocks
from moescope.kernels.quantize import rounded as round_to
from moescope.model.attention import GroupedQueryAttention, KVCache, LatentAttention
from moescope.model.cache import Cache
from moescope.model.compressed_attention import GroupedLinear
from moescope.model.decoder import CausalLM, Decoder
from moescope.model.layer import DecoderLayer
from moescope.model.moe import MLP, GroupedExperts, MoE
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.model.routing import (
    Greedy,
    GroupLimitedGreedy,
    NoAuxTopK,
    RandomFrozen,
    ReLU,
    Router,
    Sinkhorn,
)
from moescope.model.steering import SteeredRouter
from moescope.native.pack_file import NewPack, PackSource
from moescope.native.reader import Matrices, WeightReader, no_blocks
from moescope.native.weight_format import FORMATS, WEIGHT_FORMATS

EMBEDDING = "model.embed_tokens.weight"

Pack = Callable[[Matrices], "cpu.Weights"]
"""Packs matrices, or hands out what was packed before."""


class Packer:
    """Lays a network's matrices out for the kernels, one module at a time.

    Args:
        weight_format: `int8`, `int4` or `bf16`; None keeps each matrix as its file holds it.
        source: where packed weights come from; None packs them.

    Attributes:
        reads_all: whether `pack` reads all that it wants, instead of finding it packed.

    Raises:
        UserError: there is no such format.
    """

    def __init__(self, weight_format: str | None, source: PackSource | None = None) -> None:
        if weight_format not in (None, *FORMATS):
            raise UserError(f"quantize is {weight_format!r}; choose from {', '.join(FORMATS)}")
        self.weight_format = weight_format
        self._source = source or NewPack()
        self.reads_all = not self._source.from_file

    def resident_bytes(
        self, config: ModelConfig, stored: int | None = None, *, experts: bool = True
    ) -> int:
        """Return what the packed network takes, with or without its routed experts.

        Args:
            config: the network's.
            stored: bytes of the file's tensors, for a packer that keeps them as they are.
            experts: whether routed experts count.
        """
        parameters = count_parameters(config)
        matrices = parameters.total - parameters.embedding
        share = 1.0 if experts else 1 - parameters.routed_experts / matrices
        if self.weight_format is None:
            return int((stored or 0) * share + 4 * parameters.embedding)
        bits = WEIGHT_FORMATS[self.weight_format].bits_per_weight
        return int(matrices * share * bits / 8 + 2 * parameters.embedding)

    def refuse_if_too_large(
        self,
        config: ModelConfig,
        available: int,
        stored: int | None = None,
        *,
        experts: bool = True,
    ) -> None:
        """Compare what the packed network takes with the bytes that are free.

        Args:
            config: the network's.
            available: bytes.
            stored: bytes of the file's tensors, for a packer that keeps them as they are.
            experts: whether routed experts have to fit, too.

        Raises:
            UserError: it does not fit; the sentence has the sizes.
        """
        needed = self.resident_bytes(config, stored, experts=experts)
        if needed > available:
            own = self.weight_format is None
            how = "at its file's own precision" if own else f"in {self.weight_format}"
            what = "the model" if experts else "the model without its experts"
            way_out = ", or leave its experts on the disk (--stream-experts)" if experts else ""
            raise UserError(
                f"{what} takes {needed / 2**30:.1f} GiB {how}, but "
                f"{available / 2**30:.1f} GiB are free; close other programs, choose a smaller "
                f"format or a smaller model{way_out}"
            )

    def wants(self, model: CausalLM) -> set[str]:
        """Return the names of the weights that `pack` reads itself, or that no one needs."""
        wanted = {name for name in model.state_dict() if name.startswith("mtp.")}
        for prefix, module in _packable(model):
            experts = isinstance(module, GroupedExperts)
            names = ("gate_up_proj", "down_proj") if experts else ("weight",)
            wanted |= {f"{prefix}.{name}" for name in names}
        return wanted | {EMBEDDING} if cpu.available() else wanted

    def pack(
        self,
        model: CausalLM,
        tensor: Callable[[str], Tensor],
        blocks: Callable[[str], Blocks | None] = no_blocks,
    ) -> None:
        """Replace the modules of a network of which everything else is loaded, in place.

        Args:
            model: the network.
            tensor: returns a weight by its name, in the exact type.
            blocks: returns what the file holds of a weight, None where it holds it otherwise.
        """
        model.mtp = None
        if not cpu.available():
            self._round(model, tensor)
            return
        if self._source.from_file:
            read = WeightReader(_shapes(model))
        elif self.weight_format is None:
            read = WeightReader(tensor, blocks)
        else:
            read = WeightReader(tensor)
        pack = partial(self._source.weights, weight_format=self.weight_format)
        pack_experts = partial(pack, of_experts=True)
        embedding = read.tensor(EMBEDDING)
        if model.model.norm.weight.dtype == torch.bfloat16:
            embedding = embedding.bfloat16()
        embedding = nn.Parameter(self._source.tensor(embedding), requires_grad=False)
        for layer_idx, layer in enumerate(model.model.layers):
            at = f"model.layers.{layer_idx}"
            attention, mlp = layer.self_attn, layer.mlp
            assert isinstance(attention, nn.Module)
            self._pack_linears(attention, f"{at}.self_attn", read, pack)
            if isinstance(attention, LatentAttention):
                layer.self_attn = NativeLatentAttention(
                    model.config, attention, f"{at}.self_attn", read, pack
                )
            elif isinstance(attention, GroupedQueryAttention):
                layer.self_attn = NativeGroupedAttention(model.config, attention)
            if isinstance(mlp, MoE):
                layer.mlp = NativeMoE(model.config, mlp, f"{at}.mlp", read, pack, pack_experts)
            elif isinstance(mlp, MLP):
                layer.mlp = NativeMLP(mlp, f"{at}.mlp", read, pack)
        tied = model.config.tie_word_embeddings
        head = read.matrix(EMBEDDING if tied else "lm_head.weight")
        model.lm_head = PackedLinear(head, None, pack)
        if tied:
            model.lm_head.weight = embedding
        model.model.embed_tokens = WideEmbedding(embedding)
        for name, module in list(model.named_modules()):
            if isinstance(module, RMSNorm):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, NativeRMSNorm(module))
        model.model = NativeDecoder(model.model)

    def _pack_linears(self, parent: nn.Module, at: str, read: WeightReader, pack: Pack) -> None:
        for name, child in list(parent.named_children()):
            if isinstance(child, GroupedLinear):
                weight = read.tensor(f"{at}.{name}.weight")
                setattr(parent, name, NativeGroupedLinear(weight, child.groups, pack))
            elif isinstance(child, nn.Linear):
                if name != "kv_b_proj":
                    weight = read.matrix(f"{at}.{name}.weight")
                    setattr(parent, name, PackedLinear(weight, child.bias, pack))
            elif isinstance(child, nn.LayerNorm):
                child.float()
            else:  # an indexer or compressor
                self._pack_linears(child, f"{at}.{name}", read, pack)

    def _round(self, model: CausalLM, read: Callable[[str], Tensor]) -> None:
        dtype = model.model.norm.weight.dtype
        rounded = partial(round_to, weight_format=self.weight_format or "f32")
        for name in self.wants(model):
            parent, _, child = name.rpartition(".")
            weight = rounded(read(name)).to(dtype)
            weight = nn.Parameter(weight, requires_grad=False)
            setattr(model.get_submodule(parent), child, weight)
        if model.config.tie_word_embeddings:  # the embedding stays as it is
            head = rounded(model.model.embed_tokens.weight).to(dtype)
            model.lm_head.weight = nn.Parameter(head, requires_grad=False)


def _packable(model: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights are packed, by name; a tied head is none, as it has none."""
    for name, module in model.named_modules():
        if name.startswith("mtp.") or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        if isinstance(module, nn.Linear | GroupedExperts):
            yield name, module


def _shapes(model: CausalLM) -> Callable[[str], Tensor]:
    """Return what reads shapes without numbers."""
    shapes = {name: slot.shape for name, slot in model.state_dict().items()}
    return lambda name: torch.empty(shapes[name], device="meta")


def _stand_in(*shape: int) -> nn.Parameter:
    """A parameter that keeps counts and devices right where the weights are packed.

    It takes four bytes, and whoever computes with it by mistake sees NaN.
    """
    return nn.Parameter(torch.full((), torch.nan).expand(shape), requires_grad=False)


def is_stand_in(parameter: Tensor) -> bool:
    """Whether a parameter stands where weights are packed."""
    return parameter.numel() > 1 and not any(parameter.stride())


def _unpacked_shapes(module: nn.Module) -> None:
    """Put stand-ins in the place of a module's parameters."""
    for name, parameter in list(module.named_parameters()):
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _stand_in(*parameter.shape))


class PackedLinear(nn.Linear):
    """A linear map with packed weights, `(outputs, columns)` or `(matrices, outputs, columns)`."""

    def __init__(self, weight: Matrices, bias: Tensor | None, pack: Pack) -> None:
        outputs, columns = weight.shape[:-1].numel(), weight.shape[-1]
        super().__init__(columns, outputs, bias=False, device="meta")
        self.weight = _stand_in(outputs, columns)
        self.packed = pack(weight)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., columns)` to `(..., outputs)` float32."""
        return cpu.linear(self.packed, self.out_features, input, self.bias)


class NativeGroupedLinear(nn.Module):
    """A packed map of each group by itself."""

    def __init__(self, weight: Tensor, groups: int, pack: Pack) -> None:
        super().__init__()
        self.maps = nn.ModuleList(PackedLinear(part, None, pack) for part in weight.chunk(groups))

    def forward(self, input: Tensor) -> Tensor:
        """Map `(batch, seq, groups, inputs)` to `(batch, seq, groups * outputs)`."""
        outputs = [mapped(input[:, :, at]) for at, mapped in enumerate(self.maps)]
        return torch.cat(outputs, dim=-1)


class NativeMLP(MLP):
    """A feed-forward block in one call."""

    def __init__(self, mlp: MLP, at: str, read: WeightReader, pack: Pack) -> None:
        with torch.device("meta"):
            super().__init__(
                mlp.gate_proj.in_features, mlp.gate_proj.out_features, mlp.activation.limit
            )
        _unpacked_shapes(self)
        gate, up, down = (
            pack(read.matrix(f"{at}.{name}.weight"))
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.packed = gate, up, down
        self.layer = cpu.feed_forward_layer(None, self.packed, shared_limit=mlp.activation.limit)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(..., hidden)` to `(..., hidden)`."""
        return cpu.feed_forward(self.layer, hidden_states)


class NativeExperts(GroupedExperts):
    """The routed experts in one call."""

    def __init__(
        self,
        config: ModelConfig,
        experts: GroupedExperts,
        at: str,
        read: WeightReader,
        pack: Pack,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        _unpacked_shapes(self)
        gate, up, down = map(pack, read.experts(at))
        self.packed = gate, up, down
        self.gate_up_proj_bias = _wide(experts.gate_up_proj_bias)
        self.down_proj_bias = _wide(experts.down_proj_bias)
        self.layer = self.joined(None)

    def joined(self, shared: NativeMLP | None) -> "cpu.FeedForward":
        """Join these experts and a shared one, if any, into one call."""
        biases = None
        if self.gate_up_proj_bias is not None and self.down_proj_bias is not None:
            gate_bias, up_bias = self.gate_up_proj_bias.chunk(2, dim=1)
            biases = gate_bias, up_bias, self.down_proj_bias
        return cpu.feed_forward_layer(
            self.packed,
            None if shared is None else shared.packed,
            biases=biases,
            act=self.activation.kind,
            limit=self.activation.limit,
            shared_limit=None if shared is None else shared.activation.limit,
        )

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Dispatch `(tokens, hidden)` to the chosen experts and sum what they return, weighted."""
        return cpu.feed_forward(self.layer, hidden_states, topk_ids, topk_weights)


class NativeMoE(MoE):
    """Routed and shared experts in one call, unless a recorder wants to see them apart."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoE,
        at: str,
        read: WeightReader,
        pack: Pack,
        pack_experts: Pack,
    ) -> None:
        nn.Module.__init__(self)
        self.layer_idx = moe.layer_idx
        self.gate = moe.gate.float()
        self.experts = NativeExperts(config, moe.experts, f"{at}.experts", read, pack_experts)
        shared = None
        if moe.shared_experts is not None:
            shared = NativeMLP(moe.shared_experts, f"{at}.shared_experts", read, pack)
        self.shared_experts = shared
        self.layer = self.experts.joined(shared)

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, recorder: Recorder | None = None
    ) -> Tensor:
        """Map `(batch, seq, hidden)` to the same shape; `input_ids` is `(batch, seq)`."""
        if recorder is not None:
            return super().forward(hidden_states, input_ids, recorder)
        routing = self.gate(hidden_states.flatten(0, 1), input_ids.flatten())
        return cpu.feed_forward(self.layer, hidden_states, routing.topk_ids, routing.topk_weights)


class NativeLatentAttention(LatentAttention):
    """Latent attention whose projections are packed; new tokens attend absorbed."""

    def __init__(
        self,
        config: ModelConfig,
        attention: LatentAttention,
        at: str,
        read: WeightReader,
        pack: Pack,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, attention.layer_idx)
        for name, child in attention.named_children():
            setattr(self, name, child)
        expand, up_key, up_value = read.latent(at, self.heads, self.nope)
        self.kv_b_proj = PackedLinear(expand, attention.kv_b_proj.bias, pack)
        self.absorbed = cpu.absorbed_attention(pack(up_key), pack(up_value), self.scale)

    @property
    def slot_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the cache keeps of a token: its latent and its rotated key."""
        return (self.kv_lora_rank,), (self.rope,)

    def block(self, input_norm: RMSNorm, residual_multiplier: float) -> "cpu.Attention":
        """Join the norm before it and all its parts into half a layer of a native decoder."""
        query_down, query = None, "q_proj"
        if not hasattr(self, "q_proj"):
            query_down, query = (*_parts(self.q_a_proj), self.q_a_layernorm.weight), "q_b_proj"
        return cpu.latent_attention(
            (input_norm.weight, input_norm.eps),
            query_down,
            _parts(getattr(self, query))[0],
            _parts(self.kv_a_proj_with_mqa),
            (self.kv_a_layernorm.weight, self.kv_a_layernorm.eps),
            self.absorbed,
            _parts(self.kv_b_proj)[0],
            _parts(self.o_proj),
            self.interleave,
            residual_multiplier,
        )

    def attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend in the latent space, one query a row: `(batch, 1, heads, v_head_dim)`."""
        lengths = mask[:, 0, 0].sum(dim=-1)  # (batch,)
        output = cpu.attend_absorbed(
            self.absorbed, q_nope[:, 0], q_rope[:, 0], latents, k_rope, lengths, self.v_head_dim
        )
        return output[:, None]


class NativeGroupedAttention(GroupedQueryAttention):
    """Grouped-query attention whose projections are packed."""

    def __init__(self, config: ModelConfig, attention: GroupedQueryAttention) -> None:
        with torch.device("meta"):
            super().__init__(config, attention.layer_idx)
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.sinks = _wide(attention.sinks)
        self.rope = config.rotary_dim

    @property
    def slot_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the cache keeps of a token: keys and values of all heads."""
        shape = (self.kv_heads, self.q_proj.out_features // self.heads)
        return shape, shape

    def block(self, input_norm: RMSNorm, residual_multiplier: float) -> "cpu.Attention":
        """Join the norm before it and all its parts into half a layer of a native decoder."""
        return cpu.grouped_attention(
            (input_norm.weight, input_norm.eps),
            _parts(self.q_proj),
            _parts(self.k_proj),
            _parts(self.v_proj),
            _parts(self.o_proj),
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            query_norm=None if self.q_norm is None else self.q_norm.weight,
            key_norm=None if self.k_norm is None else self.k_norm.weight,
            rope=self.rope,
            interleave=self.interleave,
            clip=self.clip,
            window=self.window,
            sinks=self.sinks,
            residual_multiplier=residual_multiplier,
        )


def _parts(linear: nn.Linear) -> "tuple[cpu.Weights, Tensor | None]":
    return cast(PackedLinear, linear).packed, linear.bias


def _wide(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter in float32."""
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().float(), requires_grad=False)


NativeAttention = NativeLatentAttention | NativeGroupedAttention


class NativeDecoder(Decoder):
    """All layers in one call, unless somebody looks on or a part is PyTorch's alone.

    Such are some routers' rules, indexers, compressed attention and residuals of several streams:
    their layers run one by one, with projections and experts on the kernels.
    """

    def __init__(self, decoder: Decoder) -> None:
        nn.Module.__init__(self)
        for name, child in decoder.named_children():
            setattr(self, name, child)
        self.embedding_multiplier = decoder.embedding_multiplier
        self.streams, self.hc_head = decoder.streams, decoder.hc_head
        self.attention: list[cpu.Attention] = []
        layers = self._layers()
        halves = [layer.self_attn for layer in layers]
        known = [half for half in halves if isinstance(half, NativeAttention)]
        sparse = any(isinstance(half, LatentAttention) and half.sparse for half in known)
        if len(known) == len(layers) and not sparse:
            self.slot_shapes = known[0].slot_shapes
            self.attention = [
                attention.block(layer.input_layernorm, layer.residual_multiplier)
                for layer, attention in zip(layers, known, strict=True)
            ]
        self._join(self._gates())

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Run all layers over `(batch, seq)` ids; return `(batch, seq, hidden)` before the norm."""
        slots = Cache() if cache is None else cache
        gates = self._gates()
        if gates != self.joined_gates:  # a copy was given others, as steering does
            self._join(gates)
        if recorder is not None or not isinstance(slots, Cache) or self.all_layers is None:
            return super().forward(input_ids, positions, cache, recorder)
        if positions is None:
            positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        length = int(positions.max()) + 1
        held = slots.reserve(
            len(self.layers), len(input_ids), self.slot_shapes, length, cpu.cache_slots
        )
        width = self.embed_tokens.embedding_dim
        return cpu.run_decoder(self.all_layers, input_ids, width, positions, held)

    def _layers(self) -> "list[DecoderLayer]":
        return cast("list[DecoderLayer]", list(self.layers))

    def _gates(self) -> list[Router | None]:
        """The routers by layer, None where one is dense."""
        return [layer.mlp.gate if isinstance(layer.mlp, MoE) else None for layer in self._layers()]

    def _join(self, gates: list[Router | None]) -> None:
        """Put all layers into one call; there is none where a router is not the kernels'."""
        self.joined_gates = gates
        self.all_layers: cpu.Decoder | None = None
        if not self.attention:
            return
        rules = [None if gate is None else native_router(gate) for gate in gates]
        if any(gate is not None and rule is None for gate, rule in zip(gates, rules, strict=True)):
            return
        blocks: list[cpu.FeedForwardBlock] = []
        for layer, rule in zip(self._layers(), rules, strict=True):
            norm = layer.post_attention_layernorm
            experts = cast("NativeMLP | NativeMoE", layer.mlp).layer
            blocks.append(
                cpu.feed_forward_block(
                    (norm.weight, norm.eps), rule, experts, layer.residual_multiplier
                )
            )
        self.all_layers = cpu.decoder(
            self.embed_tokens.weight,
            self.attention,
            blocks,
            (self.rotary_emb.inv_freq, self.rotary_emb.attention_factor),
            self.embedding_multiplier,
        )


NATIVE_RULES = (Greedy, RandomFrozen, Sinkhorn, GroupLimitedGreedy, NoAuxTopK, ReLU)
"""Rules that the kernels know; Sinkhorn's outside training, where it is greedy."""


def native_router(gate: Router) -> "cpu.Router | None":
    """The same choice by the kernels; None if they do not know the gate's rule.

    The gate's weight is not copied.
    """
    steered = gate if isinstance(gate, SteeredRouter) else None
    rule = gate if steered is None else steered.rule
    if type(rule) not in NATIVE_RULES or (steered is not None and steered.noise):
        return None
    bias = rule.e_score_correction_bias if isinstance(rule, NoAuxTopK) else None
    top_k, relu = gate.top_k, isinstance(rule, ReLU)
    if relu:  # as many as have a positive logit, unless steering says how many at most
        top_k = (steered and steered.limit) or gate.n_routed_experts
    disabled: list[int] = []
    forced: list[int] = []
    if steered is not None:
        bias = steered.choice_bias
        disabled = steered.disabled.nonzero().flatten().tolist()
        forced = steered.forced.nonzero().flatten().tolist()
    grouped = isinstance(rule, GroupLimitedGreedy)
    return cpu.router(
        gate.weight,
        top_k=max(top_k, len(forced)),
        logit_bias=gate.bias,
        bias=bias,
        groups=rule.n_group if grouped else 1,
        kept_groups=rule.topk_group if grouped else 1,
        best_of_group=2 if isinstance(rule, NoAuxTopK) else 1,
        scoring="relu" if relu else rule.scoring_func,
        normalise=rule.norm_topk_prob and not relu,
        factor=rule.routed_scaling_factor,
        disabled=disabled,
        forced=forced,
    )


class NativeRMSNorm(RMSNorm):
    """The norm in one call."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm.weight.numel(), norm.eps)
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension, in float32."""
        return cpu.rms_norm(hidden_states, self.weight, self.eps)


class WideEmbedding(nn.Embedding):
    """An embedding in a narrow type whose rows are handed out in float32."""

    def __init__(self, weight: nn.Parameter) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, _weight=weight)
        narrow = weight.dtype in (torch.float32, torch.bfloat16)
        self.weight = weight if narrow else nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ids to `(..., hidden)` float32."""
        return F.embedding(input, self.weight).float()
