"""The network: embed -> layers -> norm -> logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moescope.config import ModelConfig
from moescope.model.attention import KVCache
from moescope.model.hyper_connections import HyperDecoderLayer, HyperHead
from moescope.model.indexer import Picks
from moescope.model.layer import DecoderLayer
from moescope.model.mtp import MultiTokenPredictor
from moescope.model.norm import RMSNorm
from moescope.model.recorder import Recorder
from moescope.model.rope import RotaryEmbedding


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything below the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_multiplier = config.embedding_multiplier
        self.rotary_emb = RotaryEmbedding(config)
        layer = DecoderLayer if config.hc_mult is None else HyperDecoderLayer
        self.layers = nn.ModuleList(
            layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.streams = config.hc_mult
        self.hc_head = None if config.hc_mult is None else HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Run all layers over `(batch, seq)` ids; return `(batch, seq, hidden)` before the norm."""
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = positions.expand(input_ids.shape[0], -1)  # (batch, seq)
        hidden_states = self.embed_tokens(input_ids)
        if self.embedding_multiplier != 1:
            hidden_states = hidden_states * self.embedding_multiplier
        if recorder is not None:
            recorder.embedding(hidden_states)
        rotation = self.rotary_emb(positions, hidden_states.dtype)
        if self.streams is not None:
            hidden_states = hidden_states[:, :, None].expand(-1, -1, self.streams, -1)
        picks = Picks()
        for layer_idx, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states, input_ids, rotation, positions, cache, recorder, picks
            )
            shown = recorder is not None and not recorder.wants_routing_alone
            if self.hc_head is not None and recorder is not None and shown:
                recorder.layer(layer_idx, self.hc_head(hidden_states))
        return hidden_states if self.hc_head is None else self.hc_head(hidden_states)


class CausalLM(nn.Module):
    """A decoder with its output head, and the multi-token-prediction module if it has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = MultiTokenPredictor(config) if config.num_nextn_predict_layers else None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Return normed hidden states `(batch, seq, hidden)` for ids `(batch, seq)`.

        `positions` `(batch, seq)` counts from zero where it is left out. With a `cache`, only
        the new tokens are given, and earlier ones are read from it.
        """
        return self.model.norm(self.model(input_ids, positions, cache, recorder))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map normed `(..., hidden)` to next-token logits `(..., vocab)`, float32."""
        return self.scaled(self.lm_head(hidden_states).float())

    def scaled(self, logits: Tensor) -> Tensor:
        """Divide what the head makes, `(..., vocab)`, as the model's config says."""
        scaling = self.config.logits_scaling
        return logits if scaling == 1 else logits / scaling


def without_numbers(config: ModelConfig) -> CausalLM:
    """Make a network of shapes and types alone, on the meta device."""
    with torch.device("meta"), _Uninitialised():
        return CausalLM(config)


class _Uninitialised(TorchFunctionMode):
    """Leaves out PyTorch's first values of weights.

    For the meta device they call for its compiler, whose import takes longer than opening a small
    model does.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialise(model: CausalLM, seed: int) -> None:
    """Give every parameter its first numbers, `first_weights`."""
    for parameter, weight in first_weights(model, seed):
        parameter.copy_(weight)


def first_weights(model: CausalLM, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter and its first numbers, which follow from the seed and its place.

    They are drawn from a normal of `initializer_range`; norms are one, biases zero. Maps back into
    the residual stream are scaled by `1 / sqrt(2 * layers)` (Radford et al. 2019).
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    residual_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield parameter, torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
            continue
        into_residual = "o_proj" in name or "down_proj" in name
        std = residual_std if into_residual else config.initializer_range
        yield parameter, torch.randn(parameter.shape, generator=generator) * std
