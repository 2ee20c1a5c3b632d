"""A network whose weights are packed for the native CPU kernels.

The network's definition stays the one in `model/`: modules are replaced by ones of the same kind
that hold packed weights and call `kernels.cpu`. Router, norms and scores stay float32; the
embedding is never rounded, and a row is taken out of it when a token is looked up. Without the
extension, weights are rounded all the same, and PyTorch computes with them.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.formats.source import ReadBlocks, ReadExpert
from moescope.kernels import cpu
from moescope.kernels.quantize import rounded as round_to
from moescope.machine import memory
from moescope.model.attention import GroupedQueryAttention, LatentAttention
from moescope.model.compressed_attention import GroupedLinear
from moescope.model.costs import count_parameters
from moescope.model.decoder import CausalLM
from moescope.model.moe import MLP, GroupedExperts, MoE
from moescope.model.norm import RMSNorm
from moescope.native.decoder import NativeDecoder
from moescope.native.embedding import PackedEmbedding
from moescope.native.experts import NativeMLP, NativeMoE
from moescope.native.grouped_attention import NativeGroupedAttention
from moescope.native.importance import Importance, weigh_layers
from moescope.native.latent_attention import NativeLatentAttention
from moescope.native.linear import NativeGroupedLinear, Pack, PackedLinear
from moescope.native.norm import NativeRMSNorm
from moescope.native.pack_file import NewPack, PackSource
from moescope.native.reader import Matrices, WeightReader, no_blocks
from moescope.native.weight_format import FORMATS, WEIGHT_FORMATS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

log = logging.getLogger(__name__)


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
            return int((stored or 0) * share)
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
        expert: ReadExpert,
        blocks: ReadBlocks = no_blocks,
    ) -> None:
        """Replace the modules of a network of which everything else is loaded, in place.

        Args:
            model: the network.
            tensor: returns a weight by its name, in the exact type.
            expert: returns one routed expert's matrix likewise.
            blocks: returns what the file holds of a weight, None where it holds it otherwise.
        """
        model.mtp = None
        if not cpu.available():
            self._round(model, tensor)
            return
        if self._source.from_file:
            tensor = _shapes(model)
        read = WeightReader(tensor, expert, blocks if self.weight_format is None else no_blocks)
        table = read.matrix(EMBEDDING) if self.weight_format is None else read.tensor(EMBEDDING)
        if isinstance(table, Tensor) and model.model.norm.weight.dtype == torch.bfloat16:
            table = table.bfloat16()
        embedding = self._source.weights(table, None)
        of_head = head_importance(model)
        if isinstance(table, Tensor) and self.reads_all and self._weighs(model):

            def take(layer_idx: int, importance: Importance) -> None:
                self._pack_layer(model, layer_idx, read.knowing(importance))

            of_head = weigh_layers(model, table, tensor, take)
        else:
            for layer_idx in range(len(model.model.layers)):
                self._pack_layer(model, layer_idx, read)
        heads: Importance = {HEAD: of_head, EMBEDDING: of_head}
        self._pack_head(model, table, embedding, read.knowing(heads))
        model.model.embed_tokens = PackedEmbedding(embedding, *table.shape)
        if model.config.tie_word_embeddings:  # they count once
            model.lm_head.weight = model.model.embed_tokens.weight
        for name, module in list(model.named_modules()):
            if isinstance(module, RMSNorm):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, NativeRMSNorm(module))
        model.model = NativeDecoder(model.model)

    def _weighs(self, model: CausalLM) -> bool:
        """Whether int4 is to know which columns count: each layer must fit into memory for it."""
        if self.weight_format != "int4":
            return False
        dtype = model.model.norm.weight.dtype
        largest = max(
            sum(slot.numel() for slot in layer.parameters()) for layer in model.model.layers
        )
        fits = largest * dtype.itemsize < memory()[1] // 2
        if not fits:
            log.warning(
                "a layer takes %.1f GiB unrounded, too much to find out which of its columns "
                "count: int4 is less exact than it could be",
                largest * dtype.itemsize / 2**30,
            )
        return fits

    def _pack_layer(self, model: CausalLM, layer_idx: int, read: WeightReader) -> None:
        pack = partial(self._source.weights, weight_format=self.weight_format)
        at, layer = f"model.layers.{layer_idx}", model.model.layers[layer_idx]
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
            pack_experts = partial(pack, of_experts=True)
            layer.mlp = NativeMoE(model.config, mlp, f"{at}.mlp", read, pack, pack_experts)
        elif isinstance(mlp, MLP):
            layer.mlp = NativeMLP(mlp, f"{at}.mlp", read, pack)

    def _pack_head(
        self, model: CausalLM, table: Matrices, embedding: "cpu.Weights", read: WeightReader
    ) -> None:
        tied = model.config.tie_word_embeddings
        if tied and self.weight_format is None:
            model.lm_head = PackedLinear(table, None, lambda _: embedding)
            return
        pack = partial(self._source.weights, weight_format=self.weight_format)
        model.lm_head = PackedLinear(read.matrix(EMBEDDING if tied else HEAD), None, pack)

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

        def put(name: str, weight: Tensor, importance: Tensor | None) -> None:
            if importance is not None and importance.ndim > 1:  # (experts, 1, columns)
                importance = importance[:, None]
            weight = round_to(weight, self.weight_format or "f32", importance).to(dtype)
            parent, _, child = name.rpartition(".")
            slot = nn.Parameter(weight, requires_grad=False)
            setattr(model.get_submodule(parent), child, slot)

        def put_layer(layer_idx: int, importance: Importance) -> None:
            for name in wanted:
                if name.startswith(f"model.layers.{layer_idx}."):
                    known = importance.get(name.replace(".gate_up_proj", ".gate_proj"))
                    put(name, read(name), known)

        wanted, table = self.wants(model), model.model.embed_tokens.weight
        of_head = head_importance(model)
        if self._weighs(model):
            of_head = weigh_layers(model, table, read, put_layer)
        else:
            for layer_idx in range(len(model.model.layers)):
                put_layer(layer_idx, {})
        tied = model.config.tie_word_embeddings  # the embedding stays as it is
        put(HEAD, table if tied else read(HEAD), of_head)


def head_importance(model: CausalLM) -> Tensor:
    """Return how much an error in each column of the head counts, `(hidden,)`.

    What the head sees in a column is as large as what the norm before it multiplies that with.
    """
    return model.model.norm.weight.detach().float().square()


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
