"""One layer's attention step, repeated for what a first pass did not keep."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moescope.config import ModelConfig
from moescope.model.decoder import CausalLM
from moescope.model.layer import DecoderLayer
from moescope.model.recorder import Recorder
from moescope.scope.recording import TraceRecorder


@dataclass(frozen=True)
class Attended:
    """One layer after its attention step.

    Attributes:
        given: what the norm before the feed-forward part is given, `(tokens, hidden)`.
        probabilities: `(heads, tokens, tokens)`.
        entries: of entries of compressed tokens, `(heads, tokens, entries)`.
        tokens_per_entry: 0 without entries.
    """

    given: Tensor
    probabilities: Tensor
    entries: Tensor | None
    tokens_per_entry: int


def attend_again(
    model: CausalLM, input_ids: Tensor, seen: TraceRecorder, layer_idx: int
) -> Attended:
    """Repeat a layer's attention step, and the layers before it where it depends on them.

    Args:
        model: that read the text.
        input_ids: the text, `(1, tokens)`.
        seen: what the first pass over it kept.
        layer_idx: the layer.
    """
    recorder = _AttentionRecorder(layer_idx)
    layer = cast(DecoderLayer, model.model.layers[layer_idx])
    if _depends_on_layers_before(model.config):
        hook = layer.post_attention_layernorm.register_forward_pre_hook(recorder.keep_given)
        try:
            model.model(input_ids, recorder=recorder)
        finally:
            hook.remove()
        return recorder.attended()
    before = seen.hidden_states[layer_idx - 1] if layer_idx else seen.embedded
    before = before[None]  # (1, tokens, hidden)
    positions = torch.arange(input_ids.shape[1], device=before.device)[None]
    rotation = model.model.rotary_emb(positions, before.dtype)
    normed = layer.input_layernorm(before)
    added = layer.self_attn(normed, rotation, positions, None, recorder)
    recorder.given = (before + layer.scaled(added))[0]
    return recorder.attended()


class _AttentionRecorder(Recorder):
    """Keeps one layer's attention."""

    wants_attention = True

    def __init__(self, layer_idx: int) -> None:
        self.layer_idx = layer_idx
        self.given = torch.empty(0)
        self._probabilities = torch.empty(0)
        self._entries: Tensor | None = None
        self._tokens_per_entry = 0

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        if layer_idx == self.layer_idx:
            self._probabilities = probabilities[0]

    def entry_attention(self, layer_idx: int, probabilities: Tensor, tokens_per_slot: int) -> None:
        if layer_idx == self.layer_idx:
            self._entries, self._tokens_per_entry = probabilities[0], tokens_per_slot

    def keep_given(self, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what a norm is given, `(1, tokens, hidden)`."""
        self.given = inputs[0][0]

    def attended(self) -> Attended:
        return Attended(self.given, self._probabilities, self._entries, self._tokens_per_entry)


def _depends_on_layers_before(config: ModelConfig) -> bool:
    """Whether a layer follows from more than the one residual stream before it."""
    return config.hc_mult is not None or "shared" in (config.indexer_types or ())
