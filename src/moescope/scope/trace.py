"""What happened to each token in each layer, as plain data that saves to JSON."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moescope.errors import UserError
from moescope.files import write_text


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
    """

    id: int
    text: str
    parameters_used: int


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
    """

    scores: list[list[float]]
    topk_ids: list[list[int]]
    topk_weights: list[list[float]]
    shared_share: list[float]

    @property
    def load(self) -> list[int]:
        """How many tokens each expert received, `(n_routed_experts,)`."""
        counts = [0] * len(self.scores[0])
        for ids in self.topk_ids:
            for expert in ids:
                counts[expert] += 1
        return counts


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
    """

    router: RouterTrace | None
    hidden_norm: list[float]
    guesses: list[list[Candidate]]
    attention: list[list[list[float]]] | None


@dataclass(frozen=True)
class Trace:
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

    model: str
    tokens: list[TracedToken]
    prompt_tokens: int
    total_parameters: int
    embedding_norm: list[float]
    layers: list[LayerTrace]
    guesses: list[list[Candidate]]

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        return _TRACE.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Read what `to_json` wrote.

        Raises:
            UserError: the text is no trace.
        """
        try:
            return _TRACE.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the text"
            raise UserError(f"this is no trace: {place}: {first['msg']}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON into a file, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it holds no trace.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read a trace from {path}: {error}") from error
        return cls.from_json(text)


_TRACE = TypeAdapter(Trace)
