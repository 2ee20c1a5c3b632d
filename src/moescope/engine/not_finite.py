"""Where a network's numbers end: logits that are not finite are traced to a layer and a tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.native.embedding import PackedEmbedding
from moescope.native.experts import NativeExperts, NativeMLP
from moescope.native.linear import PackedLinear, is_stand_in


class NotFinite(UserError):
    """A model computes what is no number, as damaged weights make it."""


def not_finite(model: CausalLM, ids: Sequence[int]) -> NotFinite:
    """Say where the numbers end that a model computes of a text.

    The text is read once more, so that the first layer is found behind which something is not
    finite; then this layer's weights are searched. Where nothing is found so, as attention over a
    whole text may pass over what attention to a cache does not, all weights are.
    """
    recorder = _FirstNotFinite()
    device = model.model.embed_tokens.weight.device
    with torch.inference_mode():
        model.model(torch.tensor([list(ids)], device=device), recorder=recorder)
        tensor = next(_not_finite_in(model, recorder.parts), None)
        if tensor is None and not recorder.found:
            recorder.place = "the network"
            tensor = next(_not_finite_in(model, ("model.",)), None)
    place = f"{recorder.place} computes values that are not finite"
    if tensor is None:
        return NotFinite(
            f"{place} although its weights are; open the model with dtype float32, or fetch "
            "it again"
        )
    return NotFinite(f"{place}, as its tensor {tensor} holds such; fetch the model again")


class _FirstNotFinite(Recorder):
    """Notes the first part of a network that hands on something that is not finite.

    Attributes:
        place: what that part is called.
        parts: beginnings of the names of its modules.
        found: whether it is a layer or the embedding; else it can only be what follows them.
    """

    place = "the output head"
    parts: tuple[str, ...] = ("model.norm", "lm_head")
    found = False

    def embedding(self, hidden_states: Tensor) -> None:
        """See the embedded tokens."""
        self._see(hidden_states, "the embedding", "model.embed_tokens")

    def layer(self, layer_idx: int, hidden_states: Tensor) -> None:
        """See the residual stream after a layer."""
        self._see(hidden_states, f"layer {layer_idx}", f"model.layers.{layer_idx}.")

    def _see(self, hidden_states: Tensor, place: str, part: str) -> None:
        if not self.found and not hidden_states.isfinite().all():
            self.found, self.place, self.parts = True, place, (part,)


def _not_finite_in(model: CausalLM, parts: tuple[str, ...]) -> Iterator[str]:
    """Yield what of some parts of a network holds values that are not finite, in order."""
    for name, module in model.named_modules():
        if not f"{name}.".startswith(parts):
            continue
        packed = _packed_not_finite(name, module)
        if packed is not None:
            yield from packed
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for own, tensor in tensors:
            place = None if is_stand_in(tensor) else first_not_finite(tensor)
            if place is not None:
                yield f"{name}.{own} (at {place})"


def _packed_not_finite(name: str, module: nn.Module) -> Iterator[str] | None:
    """The same of packed weights, which tell by what they make of ones; None for others."""
    if isinstance(module, PackedLinear):
        made = module(torch.ones(1, module.in_features))
        return iter([] if made.isfinite().all() else [f"{name}.weight"])
    if isinstance(module, PackedEmbedding):
        made = module.products(torch.ones(module.embedding_dim))
        return iter([] if made.isfinite().all() else [f"{name}.weight"])
    if isinstance(module, NativeMLP):
        made = module(torch.ones(1, module.gate_proj.in_features))
        return iter([] if made.isfinite().all() else [name])
    if isinstance(module, NativeExperts):
        experts, _, width = module.gate_up_proj.shape
        chosen = torch.arange(experts)[:, None]  # (experts, 1): a token for each expert
        made = module(torch.ones(experts, width), chosen, torch.ones(experts, 1))
        bad = (~made.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        return iter([f"{name} (of expert {expert})" for expert in bad])
    return None


def first_not_finite(tensor: Tensor) -> list[int] | None:
    """Return the index of a tensor's first value that is not finite; None where all are."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return None
    return (~tensor.isfinite()).nonzero()[0].tolist()
