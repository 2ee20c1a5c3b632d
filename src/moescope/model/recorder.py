"""The narrow door through which a forward pass shows what it does.

The network calls these methods when, and only when, it is handed a recorder. Tracing and the
training's balance measures are recorders; the network knows neither.
"""

from typing import Literal

from torch import Tensor

from moescope.model.routing import Routing


class Recorder:
    """Ignores everything; subclasses override what they want to see.

    Tensors are handed over as computed: attached to the graph in training, not copied.
    """

    wants_attention: bool = False
    wants_routing_alone: bool = False
    """Whether it looks at nothing else, so that nothing need be computed for it."""

    def embedding(self, hidden_states: Tensor) -> None:
        """The embedded tokens, `(batch, seq, hidden)`."""

    def attention(self, layer_idx: int, probabilities: Tensor) -> None:
        """Attention probabilities `(batch, heads, seq, slots)`, if `wants_attention`."""

    def picks(self, layer_idx: int, seen: Tensor, tokens_per_slot: int) -> None:
        """Which slots the queries of a layer with an indexer see, `(batch, seq, slots)` bool.

        A slot is a token, or a window of `tokens_per_slot` that was compressed into one.
        """

    def sinks(self, layer_idx: int, shares: Tensor) -> None:
        """What of each query's attention goes to learned sinks, `(batch, heads, seq)`."""

    def entry_attention(self, layer_idx: int, probabilities: Tensor, tokens_per_slot: int) -> None:
        """Attention to entries of so many compressed tokens, if `wants_attention`.

        `(batch, heads, seq, entries)`; with `attention`'s and the sinks' they sum to one.
        """

    def mixing(
        self,
        layer_idx: int,
        half: Literal["attention", "feed_forward"],
        pre: Tensor,
        post: Tensor,
        mix: Tensor,
    ) -> None:
        """How half a layer reads, writes and mixes the streams of the residual.

        Shapes are those of `hyper_connections.Mixing`.
        """

    def routing(self, layer_idx: int, routing: Routing) -> None:
        """What the router of a layer decided for every token, in batch-major order."""

    def experts(self, layer_idx: int, routed_output: Tensor, shared_output: Tensor | None) -> None:
        """What routed and shared experts added to the residual stream, `(tokens, hidden)` each."""

    def layer(self, layer_idx: int, hidden_states: Tensor) -> None:
        """The residual stream after a layer, `(batch, seq, hidden)`."""
