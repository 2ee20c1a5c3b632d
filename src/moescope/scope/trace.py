"""What happened to each token in each layer, as plain data that saves to JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moescope.scope.saved import Saved


@dataclass(frozen=True)
class Candidate:
    """A guess at the next token."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TracedToken:
    """A token and what it cost.

    Attributes:
        id: in the vocabulary.
        text: its spelling; a piece of a character reads U+FFFD.
        parameters_used: weights that worked on it, the embedding table included.
        weight_bytes: of the matrices that products read for it when it is made by itself; norms,
            routers and its row of the embedding are not counted.
    """

    id: int
    text: str
    parameters_used: int
    weight_bytes: int


@dataclass(frozen=True)
class RouterTrace:
    """What a mixture-of-experts layer decided; outer lists run over tokens.

    Attributes:
        scores: what the router gave each expert, `(tokens, n_routed_experts)`, before any
            balancing bias.
        topk_ids: the chosen experts of each token, the heaviest first.
        topk_weights: what each chosen expert's output was multiplied by.
        shared_share: length of the shared experts' output over the sum of the lengths of theirs
            and the routed experts', `(tokens,)`; 0 without shared experts.
        by_table: whether a fixed table chose by the token's id, whatever the scores.
    """

    scores: list[list[float]]
    topk_ids: list[list[int]]
    topk_weights: list[list[float]]
    shared_share: list[float]
    by_table: bool = False

    @property
    def load(self) -> list[int]:
        """How many tokens each expert received, `(n_routed_experts,)`."""
        counts = [0] * len(self.scores[0])
        for ids in self.topk_ids:
            for expert in ids:
                counts[expert] += 1
        return counts


@dataclass(frozen=True)
class Picks:
    """Which slots each token sees in a layer whose indexer picks them (DeepSeek-V3.2, V4, GLM-5).

    Attributes:
        tokens_per_slot: 1 where tokens are picked; more where a slot is an entry of so many
            compressed tokens, which the last tokens are seen beside.
        slots: of each token, in order.
    """

    tokens_per_slot: int
    slots: list[list[int]]


@dataclass(frozen=True)
class Mixing:
    """How half a layer reads, writes and mixes the streams of the residual (DeepSeek-V4's mHC).

    Attributes:
        pre: weight of each stream in what is read, `(tokens, streams)`.
        post: weight of what is computed in each stream, `(tokens, streams)`.
        mix: `(tokens, streams, streams)`; entry `i, j` is the share of the old stream `i` in the
            new stream `j`.
    """

    pre: list[list[float]]
    post: list[list[float]]
    mix: list[list[list[float]]]

    @classmethod
    def join(cls, parts: Sequence["Mixing"]) -> "Mixing":
        """Return that of a text of those of its parts, in order."""
        return cls(
            [row for part in parts for row in part.pre],
            [row for part in parts for row in part.post],
            [row for part in parts for row in part.mix],
        )


@dataclass(frozen=True)
class LayerTrace:
    """One layer; outer lists run over tokens.

    Attributes:
        router: None in a dense layer.
        hidden_norm: length of the residual stream after the layer, `(tokens,)`.
        guesses: the next-token guesses that the output head reads off the residual stream
            here ("logit lens", nostalgebraist 2020), likeliest first.
        attention: probabilities `(heads, tokens, tokens)`, row attends to column; None unless
            asked for.
        entry_attention: likewise of entries of compressed tokens, `(heads, tokens, entries)`; None
            without such.
        picks: None without an indexer.
        sink_share: what of a token's attention goes to learned sinks, mean of the heads,
            `(tokens,)`; None without sinks.
        mixing: of the attention and of the feed-forward half; None with a single stream.
    """

    router: RouterTrace | None
    hidden_norm: list[float]
    guesses: list[list[Candidate]]
    attention: list[list[list[float]]] | None
    entry_attention: list[list[list[float]]] | None = None
    picks: Picks | None = None
    sink_share: list[float] | None = None
    mixing: tuple[Mixing, Mixing] | None = None


@dataclass(frozen=True)
class Trace(Saved):
    """A text's way through a model.

    Attributes:
        model: what it was loaded as.
        tokens: the prompt's, then those the model continued it with.
        prompt_tokens: how many are the prompt's.
        total_parameters: of the model, without multi-token prediction.
        embedding_norm: length of each token's embedding, `(tokens,)`.
        layers: in order.
        guesses: for each token, what the model says comes next, likeliest first.
    """

    noun: ClassVar[str] = "a trace"

    model: str
    tokens: list[TracedToken]
    prompt_tokens: int
    total_parameters: int
    embedding_norm: list[float]
    layers: list[LayerTrace]
    guesses: list[list[Candidate]]
