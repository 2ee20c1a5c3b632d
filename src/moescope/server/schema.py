"""What the page and the server say to each other: the one definition of every message.

The TypeScript types of the page are generated from these models (`web/`, by way of OpenAPI), so
nothing here is written twice. Everything is stateless: a request names the token ids and the
steering, and the answer follows from them alone, so that a link reproduces a picture.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TEXT = 20_000
"""Characters of a prompt that the page sends; longer text gets a sentence instead of an answer."""


class Message(BaseModel):
    """A message; unknown fields are mistakes. Answers are read off the engine's own data."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


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
    rule: Literal["softmax", "sigmoid", "relu", "random"] | None = None
    without_bias: bool = False
    noise: float = Field(default=0.0, ge=0, le=100)
    noise_seed: int = 0
    bias: list["ExpertBias"] = []
    disabled: list[ExpertId] = []
    forced: list[ExpertId] = []


class ExpertBias(ExpertId):
    """A number added to an expert's score for the choice."""

    bias: float


class SamplingRequest(Message):
    """How the next token is picked; see `engine.sampling.SamplingParams`."""

    temperature: float = Field(default=0.0, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    seed: int = 0


# --- GET /api/model ------------------------------------------------------------------------------


class LayerInfo(Message):
    """One layer; expert counts are 0 in a dense one."""

    kind: Literal["dense", "moe"]
    n_routed_experts: int
    n_shared_experts: int


class ParameterInfo(Message):
    """Parameters of a model, in numbers of weights."""

    total: int
    active: int


class CacheInfo(Message):
    """Numbers that one token leaves in the key-value cache of one layer.

    Attributes:
        kept: what the model keeps (the latent and the rotated key, under latent attention).
        full: what plain multi-head attention of the same heads would keep.
    """

    kept: int
    full: int


class Example(Message):
    """A text to begin with."""

    domain: str
    language: Literal["zh", "en"]
    text: str


class CompanionInfo(Message):
    """A model that can be shown beside the page's own.

    Attributes:
        role: `dense`, a twin without routed experts; `unbalanced`, a copy trained without
            balancing.
        problem: why it cannot be opened, in a sentence; None where nothing speaks against it.
    """

    name: str
    role: Literal["dense", "unbalanced"]
    problem: str | None


class ModelInfo(Message):
    """What the page needs to know before anything is typed.

    Attributes:
        layers: in order.
        num_experts_per_tok: experts a token visits; 0 without routed experts.
        scoring_func, topk_method: DeepSeek's names of the router's rule.
        context: tokens at most.
        reference: DeepSeek-R1's parameters, to scale.
        companions: models that can be shown beside this one, at most one of each role.
        has_specialization: whether `/api/specialization` answers.
        has_training: whether `/api/training` answers.
        watching: whether `/api/training/live` follows a training that runs now.
    """

    name: str
    layers: list[LayerInfo]
    num_experts_per_tok: int
    scoring_func: str
    topk_method: str
    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    context: int
    parameters: ParameterInfo
    cache: CacheInfo
    reference: ParameterInfo
    companions: list[CompanionInfo]
    has_specialization: bool
    has_training: bool
    watching: bool
    examples: list[Example]


# --- POST /api/generate (server-sent events) and POST /api/trace ---------------------------------


class Candidate(Message):
    """A guess at the next token."""

    id: int
    text: str
    probability: float


class LayerStep(Message):
    """What one mixture-of-experts layer did with one token.

    Attributes:
        topk_ids: the chosen experts, the heaviest first.
        topk_weights: their weights.
        shared_share: length of the shared experts' output over the sum of the lengths of theirs
            and the routed experts'.
    """

    topk_ids: list[int]
    topk_weights: list[float]
    shared_share: float


class TokenStep(Message):
    """One token of the text and what it took; streamed as it is made.

    Attributes:
        index: place in the text, from 0.
        text: its spelling; a piece of a character reads U+FFFD.
        bytes: its UTF-8 bytes.
        in_prompt: whether the reader wrote it.
        special: whether it is a control token, as the begin token or `<think>`'s kin.
        logprob: natural logarithm of the probability that the model gave it; None for the first.
        parameters_used: weights that worked on it.
        layers: per layer; None where the layer is dense.
        lens: the likeliest next token read off after each layer ("logit lens").
        candidates: what the model says comes after this token, likeliest first.
    """

    index: int
    id: int
    text: str
    bytes: list[int]
    in_prompt: bool
    special: bool
    logprob: float | None
    parameters_used: int
    layers: list[LayerStep | None]
    lens: list[Candidate]
    candidates: list[Candidate]


class GenerateRequest(Message):
    """Continue a text; `ids` continues exactly these tokens instead."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: list[int] | None = None
    max_tokens: int = Field(default=32, ge=0, le=1024)
    sampling: SamplingRequest = SamplingRequest()
    steering: SteeringRequest = SteeringRequest()


class TokenEvent(Message):
    """A token was read (those of the prompt first) or made."""

    type: Literal["token"] = "token"
    step: TokenStep


class EndEvent(Message):
    """The text has ended.

    Attributes:
        finish_reason: "stop" at an end token, "length" at `max_tokens` or the context's end.
        seconds: of making the new tokens.
    """

    type: Literal["end"] = "end"
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    seconds: float


class ErrorEvent(Message):
    """Something the reader can mend; also the body of every answer with a 4xx status."""

    type: Literal["error"] = "error"
    message: str


class TextRequest(Message):
    """A text, as ids or as characters, under a steering."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: list[int] | None = None
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


class Neighbour(Message):
    """A token whose embedding points the same way; `similarity` is the cosine."""

    id: int
    text: str
    similarity: float


class AttentionDetail(Message):
    """What the token looks back at in one layer: `heads[head][place]`, and their mean."""

    heads: list[list[float]]
    mean: list[float]


class RouterDetail(Message):
    """One router's decision about the token; lists run over the layer's routed experts.

    Attributes:
        logits: the router's linear map (after noise).
        scores: after the scoring function.
        bias: the balancing bias, with the reader's own added.
        choice_scores: what the choice went by: scores plus bias; None for experts that were
            ruled out (switched off, or outside the chosen groups).
        threshold: the lowest choice score that was chosen.
        topk_ids, topk_weights: the chosen, the heaviest first.
    """

    logits: list[float]
    scores: list[float]
    bias: list[float]
    choice_scores: list[float | None]
    threshold: float
    topk_ids: list[int]
    topk_weights: list[float]


class Contribution(Message):
    """One summand of the layer's output: a routed expert, or all shared ones (`expert` None).

    Attributes:
        weight: what its output was multiplied by (1 for the shared experts).
        norm: length of the weighted output.
        projection: its part along the direction of the whole sum; these add up to the length of
            the sum.
    """

    expert: int | None
    weight: float
    norm: float
    projection: float


class MergeDetail(Message):
    """How the layer's output came together; `output_norm` is the sum's length."""

    contributions: list[Contribution]
    output_norm: float
    residual_norm_before: float
    residual_norm_after: float


class PickCandidate(Candidate):
    """A guess with its logit, and its probability after temperature and filters."""

    logit: float
    filtered_probability: float


class TokenDetail(Message):
    """Everything about one token in one layer.

    Attributes:
        embedding: the token's vector.
        neighbours: tokens with the most similar embeddings.
        hidden_norms: length of the residual stream: embedding, then after each layer.
        router, merge: None in a dense layer.
        lens: the likeliest next tokens read off after each layer.
        candidates: what comes after this token, likeliest first.
        picked: id of the token that greedy choice or the seed picks from them.
    """

    embedding: list[float]
    neighbours: list[Neighbour]
    hidden_norms: list[float]
    attention: AttentionDetail
    router: RouterDetail | None
    merge: MergeDetail | None
    lens: list[list[Candidate]]
    candidates: list[PickCandidate]
    picked: int


# --- POST /api/expert: inside one expert ---------------------------------------------------------


class ExpertRequest(TextRequest):
    """An expert, and the token that it is shown at work on (chosen or not)."""

    index: int = Field(ge=0)
    layer: int = Field(ge=0)
    expert: int = Field(ge=0)


class TypicalToken(Message):
    """A token that comes to an expert far more often than to others (`lift` times)."""

    id: int
    text: str
    count: int
    lift: float
    context: str


class ExpertDetail(Message):
    """One expert at work: `down(silu(gate) * up)`.

    Attributes:
        gate, up, activated: `(moe_intermediate_size,)`.
        output: `(hidden_size,)`, before the routing weight.
        typical: its most typical tokens in held-out text; empty where none were gathered.
        domains: share of each domain's routed slots that it serves.
    """

    gate: list[float]
    up: list[float]
    activated: list[float]
    output: list[float]
    typical: list[TypicalToken]
    domains: dict[str, float]


# --- GET /api/specialization ---------------------------------------------------------------------


class SpecializationAnswer(Message):
    """Who serves whom, measured on held-out text.

    Attributes:
        layers: indices of the mixture-of-experts layers.
        load: `[domain][layer position][expert]`: share of the domain's routed slots.
        mutual_information: bits that an expert tells about the domain, per layer position.
    """

    domains: list[str]
    layers: list[int]
    load: list[list[list[float]]]
    mutual_information: list[float]


# --- POST /api/dense: the dense twin beside it ---------------------------------------------------


class DenseRequest(Message):
    """The same ids to both models."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    ids: list[int] | None = None


class Contestant(Message):
    """One model on one text.

    Attributes:
        losses: nats per token, from the second token on.
        flops_per_token, bytes_per_token: of generating one token, with an empty context.
        milliseconds_per_token: measured now, one token at a time over this text.
    """

    name: str
    parameters: ParameterInfo
    losses: list[float]
    flops_per_token: int
    bytes_per_token: int
    milliseconds_per_token: float
    next_tokens: list[Candidate]


class DenseAnswer(Message):
    """The mixture first, then its twin."""

    contestants: list[Contestant]


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


class TrainingRow(Message):
    """One logged step.

    Attributes:
        held_out: nats per token of each domain, where the step was evaluated.
        max_violation: of each mixture-of-experts layer (the busiest expert's surplus over an even
            share).
    """

    step: int
    loss: float
    held_out: dict[str, float]
    max_violation: dict[str, float]


class ExpertsSnapshot(Message):
    """Who served whom at one step: `load[domain][layer][expert]`, shares of the slots."""

    step: int
    load: list[list[list[float]]]


class TrainingAnswer(Message):
    """A training's history."""

    steps: int
    domains: list[str]
    rows: list[TrainingRow]
    snapshots: list[ExpertsSnapshot]


class TrainingEvent(Message):
    """A row of a training that runs now."""

    type: Literal["row"] = "row"
    row: TrainingRow
    steps: int
