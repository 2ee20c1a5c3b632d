"""What the page and the server say to each other: the one definition of every message.

The TypeScript types of the page are generated from these models (`web/`, by way of OpenAPI), and
answers hold the engine's own dataclasses as they are, so nothing here is written twice. Everything
is stateless: a request names the token ids and the steering, and the answer follows from them
alone, so that a link reproduces a picture.
"""

from typing import Annotated, Literal

from pydantic import Field

from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.lab.beside import Contestant, ParameterCount
from moescope.model.steering import Rule
from moescope.scope.cards import Card
from moescope.scope.detail import ExpertDetail
from moescope.scope.history import TrainingRow
from moescope.scope.specialization import TypicalToken
from moescope.scope.steps import End, TokenStep
from moescope.scope.twin_study import TwinStudy
from moescope.server.companions import Role
from moescope.server.fields import List, Message

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
MAX_TEXT = 20_000
"""Characters of a prompt that the page sends; longer text gets a sentence instead of an answer."""
MAX_NOISE = 100
"""Of the router's logits: beyond it nothing is left of them."""


# --- what every picture can be asked with --------------------------------------------------------


class ExpertId(Message):
    """One routed expert."""

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)


class SteeringRequest(Message):
    """What the reader changed about the router; empty is the model as it is.

    Attributes:
        num_experts_per_tok: experts a token visits.
        rule: another rule over the same router logits: `softmax` (top-k), `sigmoid` (top-k),
            `relu` (every expert with a positive logit), `random` (a fixed random map).
        without_bias: leave the balancing bias out of the choice.
        noise: standard deviation of a normal noise on the router logits.
        noise_seed: of that noise.
        bias: added to an expert's score for the choice, as the balancing bias is.
        disabled: experts that nobody may choose.
        forced: experts that every token visits, with the weight that their score gives.
    """

    num_experts_per_tok: int | None = Field(default=None, ge=1)
    rule: Rule | None = None
    without_bias: bool = False
    noise: float = Field(default=0.0, ge=0, le=MAX_NOISE)
    noise_seed: int = 0
    bias: List["ExpertBias"] = Field(default=[])
    disabled: List[ExpertId] = Field(default=[])
    forced: List[ExpertId] = Field(default=[])


class ExpertBias(ExpertId):
    """A number added to an expert's score for the choice."""

    bias: float


class SamplingRequest(Message):
    """How the next token is picked: fields of `SamplingParams`, which knows what they may be.

    The seed alone has another default: a link reproduces a text.
    """

    temperature: float = SamplingParams.temperature
    top_k: int | None = SamplingParams.top_k
    top_p: float | None = SamplingParams.top_p
    min_p: float | None = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    presence_penalty: float = SamplingParams.presence_penalty
    seed: int = 0


# --- GET /api/model ------------------------------------------------------------------------------


class LayerInfo(Message):
    """One layer; expert counts are 0 in a dense one.

    Attributes:
        by_table: whether a fixed table over token ids chooses the experts.
    """

    kind: Literal["dense", "moe"]
    n_routed_experts: int
    n_shared_experts: int
    by_table: bool


class ReferenceInfo(Message):
    """A well-known mixture, to scale.

    Attributes:
        total: its parameters.
        active: those at work on a token, the input table included.
    """

    name: str
    total: int
    active: int
    num_experts_per_tok: int
    n_routed_experts: int
    num_hidden_layers: int
    vocab_size: int
    context: int
    cache: "CacheInfo"


class CacheInfo(Message):
    """Numbers that one token leaves in the key-value cache of one layer.

    Attributes:
        kind: `latent` attention keeps one short vector for all heads, `grouped` keys and values
            for groups of heads, `full` for every head; `compressed` (DeepSeek-V4) keeps entries of
            many tokens, so that there is no one number for a token.
        kept: what the model keeps (the latent and the rotated key, under latent attention).
        full: what plain multi-head attention of the same heads would keep.
    """

    kind: Literal["latent", "grouped", "full", "compressed"]
    kept: int
    full: int


class Example(Message):
    """A text to begin with; `label` is what of it a reader wants to see."""

    domain: str
    language: Language
    label: str
    text: str


class CompanionInfo(Message):
    """A model that can be shown beside the page's own: a `Companion`, but where it lies."""

    name: str
    role: Role
    problem: str | None


class ModelInfo(Message):
    """What the page needs to know before anything is typed.

    Attributes:
        layers: in order.
        num_experts_per_tok: experts a token visits; 0 without routed experts.
        scoring_func, topk_method: DeepSeek's names of the router's rule.
        softmax_after_topk: whether weights are a softmax over the chosen experts' logits alone.
        sampling: how this model's texts are drawn unless asked otherwise.
        context: tokens at most.
        reference: DeepSeek-R1, to scale.
        companions: models that can be shown beside this one, at most one of each role.
        has_training: whether `/api/training` answers.
        watching: whether `/api/training/live` follows a training that runs now.
        traffic: whether `/api/traffic` tells what others ask.
        question_form: the model's chat form, with `{question}` in it; None where it has none.
        thinks: whether its vocabulary has the marks around a chain of thought.
    """

    name: str
    layers: list[LayerInfo]
    num_experts_per_tok: int
    scoring_func: str
    topk_method: str
    softmax_after_topk: bool
    sampling: SamplingRequest
    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    context: int
    parameters: ParameterCount
    cache: CacheInfo
    reference: ReferenceInfo
    companions: list[CompanionInfo]
    has_training: bool
    watching: bool
    traffic: bool
    question_form: str | None
    thinks: bool
    examples: list[Example]


# --- POST /api/generate (server-sent events) and POST /api/trace ---------------------------------


class GenerateRequest(Message):
    """Continue a text; `ids` continues exactly these tokens instead.

    Attributes:
        known: tokens at the beginning that the asker has, and of which no events come.
    """

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: List[int] | None = None
    known: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=32, ge=0, le=1024)
    sampling: SamplingRequest = SamplingRequest()
    steering: SteeringRequest = SteeringRequest()


class TokenEvent(Message):
    """A token was read (those of the prompt first) or made."""

    type: Literal["token"] = "token"
    step: TokenStep


class EndEvent(Message):
    """The text has ended."""

    type: Literal["end"] = "end"
    end: End


class ErrorEvent(Message):
    """Something the reader can mend; also the body of every answer with a 4xx status.

    Attributes:
        code: what went wrong in a word, by which the page says it in the reader's language; ""
            where there is only the sentence.
        values: what the sentence names.
    """

    type: Literal["error"] = "error"
    message: str
    code: str = ""
    values: dict[str, str | int] = Field(default={})

    @classmethod
    def of(cls, error: UserError) -> "ErrorEvent":
        """The message for a mistake."""
        return cls(message=str(error), code=error.code, values=error.values)


class TextRequest(Message):
    """A text, as ids or as characters, under a steering."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: List[int] | None = None
    steering: SteeringRequest = SteeringRequest()


class TraceAnswer(Message):
    """All tokens of a text at once, as `/api/generate` streams them."""

    steps: list[TokenStep]


# --- POST /api/token: one token in detail --------------------------------------------------------


class TokenRequest(TextRequest):
    """A token of a text and a layer of the model."""

    index: int = Field(ge=0)
    layer: int = Field(ge=0)
    sampling: SamplingRequest = SamplingRequest()


# --- POST /api/cut: the same text in another vocabulary -------------------------------------------


class CutRequest(Message):
    """A text to be cut as DeepSeek-V3 and R1 do."""

    text: Annotated[str, Field(max_length=MAX_TEXT)]


class Piece(Message):
    """A token of another vocabulary; in its spelling a piece of a character reads U+FFFD."""

    text: str
    bytes: list[int]


class CutAnswer(Message):
    """The text's tokens in DeepSeek's vocabulary; None where that vocabulary is not installed."""

    pieces: list[Piece] | None


# --- POST /api/expert: inside one expert ---------------------------------------------------------


class ExpertRequest(TextRequest):
    """An expert, and the token that it is shown at work on (chosen or not)."""

    index: int = Field(ge=0)
    layer: int = Field(ge=0)
    expert: int = Field(ge=0)


class ExpertAnswer(Message):
    """One expert at work, and what it was measured to do.

    Attributes:
        typical: its most typical tokens in held-out text; empty where none were gathered.
        domains: share of each domain's routed slots that it serves.
    """

    work: ExpertDetail
    typical: list[TypicalToken]
    domains: dict[str, float]


# --- GET /api/specialization ---------------------------------------------------------------------


class SpecializationAnswer(Message):
    """Who serves whom, measured on held-out text.

    Attributes:
        layers: indices of the mixture-of-experts layers.
        load: `[domain][layer position][expert]`: share of the domain's routed slots.
        mutual_information: bits that an expert tells about the domain, per layer position.
        cards: `[layer position][expert]`.
    """

    domains: list[str]
    layers: list[int]
    load: list[list[list[float]]]
    mutual_information: list[float]
    cards: list[list[Card]]


# --- GET /api/start/zh and /api/start/en ---------------------------------------------------------


class StartAnswer(Message):
    """All that the page shows first, in one answer.

    Attributes:
        specialization: None where nothing was measured.
        prompt: the text to begin with in that language.
        steps: its tokens.
        hero: what the first screen asks for.
    """

    model: ModelInfo
    specialization: SpecializationAnswer | None
    prompt: str
    steps: list[TokenStep]
    hero: GenerateRequest


# --- POST /api/dense: the dense twin beside it ---------------------------------------------------


class DenseRequest(Message):
    """The same ids to both models."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: List[int] | None = None


class DenseAnswer(Message):
    """The mixture first, then its dense twin, then a large one where there is one.

    Attributes:
        held_out: nats a token of each domain's held-out text; empty where one's was not measured.
        steps: of the training of each of them; None where its history was not kept.
        study: a small mixture beside dense twins of both sizes; None where none is in the box.
    """

    contestants: list[Contestant]
    held_out: dict[str, list[float]]
    steps: list[int | None]
    study: TwinStudy | None


# --- POST /api/unbalanced: a copy trained without balancing beside it -----------------------------


class UnbalancedRequest(DenseRequest):
    """A text for the copy to read."""


class UnbalancedAnswer(Message):
    """How a copy that was trained without balancing spreads a text over its experts.

    Attributes:
        steps, own_steps: steps of its training and of this model's; None where none was kept.
        layers: indices of the mixture-of-experts layers.
        load: `[layer position][expert]`: share of the text's routed slots.
        domains: kinds of text that were measured of it before; empty where none was.
        domain_load: `[domain][layer position][expert]`: the same shares, on held-out text.
    """

    name: str
    steps: int | None
    own_steps: int | None
    layers: list[int]
    load: list[list[float]]
    domains: list[str]
    domain_load: list[list[list[float]]]


# --- GET /api/training and /api/training/live (server-sent events) -------------------------------


class TrainingEvent(Message):
    """A row of a training that runs now."""

    type: Literal["row"] = "row"
    row: TrainingRow
    steps: int


# --- GET /api/traffic (server-sent events) and POST /api/answer -----------------------------------


WatchedState = Literal["waiting", "running", "ended", "cancelled", "failed"]
"""Nothing made yet; being made; made; its client hung up; the server could not go on with it."""


class WatchedText(Message):
    """One answer of a request.

    Attributes:
        prompt, answer: their beginnings.
        kept: whether `/api/answer` tells its tokens; very long ones are not kept.
    """

    prompt: str
    answer: str
    new_tokens: int
    kept: bool


class WatchedRequest(Message):
    """A request to the server that the page stands in.

    Attributes:
        number: by which it is asked for.
        path: of the API that was asked.
        came: seconds of Unix time.
        prompt_tokens, new_tokens: of all its texts.
        tokens_per_second: made since the first; None until there are two.
        count: texts that it asked for; `texts` holds the first of them.
        steered: whether it changed the router.
    """

    number: int
    path: str
    came: float
    state: WatchedState
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float | None
    count: int
    steered: bool
    texts: list[WatchedText]


class TrafficEvent(Message):
    """Requests that are new or have changed; those before `oldest` have left the list."""

    type: Literal["traffic"] = "traffic"
    requests: list[WatchedRequest]
    oldest: int


class AnswerRequest(Message):
    """One of the answers to a request in the list."""

    number: int
    text: int = Field(default=0, ge=0)


class WatchedAnswer(Message):
    """An answer's tokens after its prompt's, and the steering under which they were made."""

    ids: list[int]
    prompt_tokens: int
    prompt: str
    steering: SteeringRequest
