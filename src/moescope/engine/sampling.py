"""From next-token logits to a token: penalties, filters and the draw."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moescope.engine.constraint import Constraint
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.model.steering import Steering

MOST_TOP_LOGPROBS = 20
LARGEST = 1e30
"""Of a penalised logit either way: over the lowest temperature it is still a float32."""
COLDEST = 1e-5
"""Below this temperature logits over it would be beyond what a float32 tells apart."""


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, `least` itself left out where it is `open`."""

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.open else self.least <= value) and (
            value <= self.most and value != math.inf
        )

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least:g}" if self.open else f"{self.least:g} or more"
        if self.open:
            return f"above {self.least:g} and at most {self.most:g}"
        return f"from {self.least:g} to {self.most:g}"


RANGES: dict[str, Range] = {
    "max_tokens": Range(0),
    "temperature": Range(0),
    "top_k": Range(1),
    "top_p": Range(0, 1, open=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, open=True),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "min_tokens": Range(0),
    "top_logprobs": Range(0, MOST_TOP_LOGPROBS),
    "prompt_logprobs": Range(0, MOST_TOP_LOGPROBS),
}
"""What fields of `SamplingParams` may be, where they are not None."""


@dataclass(frozen=True)
class Choice:
    """A token that was chosen.

    Attributes:
        id: in the vocabulary.
        logprob: natural logarithm of its probability, before temperature and filters.
        top_logprobs: ids and logprobs of the likeliest tokens, as many as were asked for.
    """

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is chosen, and when it ends.

    Attributes:
        max_tokens: tokens to make at most.
        temperature: 0, as anything below `COLDEST`, takes the likeliest token; logits are divided
            by anything above.
        top_k: keep this many likeliest tokens.
        top_p: keep the likeliest tokens whose probabilities first reach this sum.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 1, tokens already seen become less likely.
        frequency_penalty: above 0, tokens of the continuation do, the more often they were made.
        presence_penalty: above 0, tokens of the continuation do, however often they were made.
        seed: of the draws; the same seed makes the same text. None takes another each time.
        stop: texts that end the continuation and are left out of it.
        stop_token_ids: ids that end it, besides the model's own end token.
        ignore_eos: whether the model's own end token does not.
        top_logprobs: how many of the likeliest tokens are told with each token.
        prompt_logprobs: how many are told with each token of the prompt, beside how likely that
            token was; None tells nothing of them.
        min_tokens: tokens to make before one may end the text.
        logit_bias: what is added to the logits of some tokens, by id.
        constraint: what the text must be.
        skip_special_tokens: whether special tokens leave no text.
        routed_experts: whether it is told which experts served each token.
        steering: what the routers do otherwise for this text.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    constraint: Constraint | None = None
    skip_special_tokens: bool = True
    routed_experts: bool = False
    steering: Steering | None = None

    def __post_init__(self) -> None:
        """Refuse values without meaning.

        Raises:
            UserError: names the field, its value and the values allowed.
        """
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, allowed in RANGES.items():
            value: float | None = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(f"{name} is {value!r}; it must be {allowed}")
        if "" in self.stop:
            raise UserError(f"stop is {self.stop!r}; it must be texts that are not empty")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def penalises(self) -> bool:
        """Whether what was read or made before changes how likely a token is."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


def penalised(logits: Tensor, ids: Sequence[int], made: int, params: SamplingParams) -> Tensor:
    """Make tokens of a text less likely, or more.

    Args:
        logits: `(vocab,)`.
        ids: of the text.
        made: how many of them, the last ones, were made and not given.
        params: with the repetition penalty, which divides the positive logits of all of them and
            multiplies the negative ones (Keskar et al. 2019, section 4.1), and the frequency and
            presence penalties, which are taken off the logits of those made: once for each time
            that a token was made, and once if it was made at all (as the OpenAI API defines them).
    """
    seen = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    scores, penalty = logits[seen], params.repetition_penalty
    scores = torch.where(scores > 0, scores / penalty, scores * penalty).clamp(-LARGEST, LARGEST)
    logits = logits.index_put((seen,), scores)
    counts = seen[len(ids) - made :].bincount(minlength=len(logits))  # (vocab,)
    return logits - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty


def biased(logits: Tensor, biases: Mapping[int, float]) -> Tensor:
    """Add to the logits `(vocab,)` of some tokens; ids beyond the vocabulary are passed over."""
    known = {token_id: bias for token_id, bias in biases.items() if token_id < len(logits)}
    ids = torch.tensor([*known], dtype=torch.int64, device=logits.device)
    return logits.index_add(0, ids, torch.tensor([*known.values()], device=logits.device))


def allowed(logits: Tensor, mask: Tensor | None, forbidden: Iterable[int]) -> Tensor:
    """Rule out tokens of `(vocab,)` that a mask, `(vocab,)` booleans, does not allow, and others.

    Forbidden ids beyond the vocabulary are passed over.

    Raises:
        UserError: no token is left.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
    known = [token_id for token_id in forbidden if 0 <= token_id < len(logits)]
    ids = torch.tensor(known, dtype=torch.int64, device=logits.device)
    logits = logits.index_fill(0, ids, -torch.inf)
    if not logits.isfinite().any():
        raise UserError("no token may come next; ask for fewer min_tokens or allow more")
    return logits


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Rule out all but the `top_k` highest of `(vocab,)`."""
    threshold = logits.topk(min(top_k, logits.shape[-1])).values[-1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Rule out all but the nucleus of `(vocab,)` (Holtzman et al. 2020, eq. 2)."""
    ordered, ids = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
    return logits.index_fill(0, ids[before >= top_p], -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Rule out tokens less likely than `min_p` of the likeliest (Nguyen et al. 2024, eq. 2)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities `(vocab,)` from which the next token is drawn.

    Temperature 0 leaves everything to the likeliest token. `logits`, `(vocab,)` float32, have been
    penalised already.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    logits = logits / params.temperature
    if params.top_k is not None:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p is not None and params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p is not None:
        logits = keep_min_p(logits, params.min_p)
    return logits.softmax(dim=-1)


def draw(generator: torch.Generator) -> float:
    """Draw a number from [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def choose(logits: Tensor, params: SamplingParams, drawn: float) -> int:
    """Choose the next token's id from its logits; the other arguments as for `distribution`.

    `drawn`, from [0, 1), falls somewhere among the probabilities, likeliest first.
    """
    probabilities = distribution(logits, params)
    if params.temperature == 0:
        return int(probabilities.argmax())
    ordered, ids = probabilities.double().cpu().sort(descending=True, stable=True)
    return int(ids[_place(ordered, drawn)])


def _place(probabilities: Tensor, drawn: float) -> int:
    """Where a share of all the probabilities is reached, adding them up from the first."""
    cumulated = probabilities.cumsum(0)
    place = int(torch.searchsorted(cumulated, drawn * cumulated[-1], right=True))
    return min(place, len(cumulated) - 1)


SHORTLIST = 64
"""Likeliest tokens among which a choice is nearly always found, where a model is sure of itself."""
LONGER = (1024, 8192)
"""And where it is not: to put a whole vocabulary in order takes longer than a small network."""


@dataclass(frozen=True)
class Shortlist:
    """The likeliest tokens of each of several rows, in order, and what normalises the rows.

    Attributes:
        ids: of each row, as many for one as for another.
        logits: those of `ids`.
        log_sums: logarithm of the sum of all tokens' exponentials, of each row.
        tempered: likewise, of the logits over each row's temperature.
        vocab: tokens that there are.
    """

    ids: list[list[int]]
    logits: list[list[float]]
    log_sums: list[float]
    tempered: list[float]
    vocab: int

    @classmethod
    def of(cls, logits: Tensor, params: Sequence[SamplingParams]) -> "Shortlist":
        """Take the shortlist of `(rows, vocab)` logits; if no row wants more, of one token."""
        greedy = not any(one.temperature or one.top_logprobs for one in params)
        count = 1 if greedy else min(SHORTLIST, logits.shape[-1])
        scales = [1 / one.temperature if one.temperature else 1.0 for one in params]
        if _native(logits):
            return cls(*cpu.shortlist(logits, count, scales), logits.shape[-1])
        ids, values = likeliest(logits, count)
        scaled = logits * torch.tensor(scales, device=logits.device)[:, None]
        sums, tempered = log_sums(logits).tolist(), log_sums(scaled).tolist()
        return cls(ids.tolist(), values.tolist(), sums, tempered, logits.shape[-1])

    def of_row(self, row: int, logits: Tensor, count: int) -> "Shortlist":
        """Take one of `count` tokens for a row alone, of logits `(vocab,)`."""
        ids, values = likeliest(logits[None], min(count, self.vocab))
        sums, tempered = [self.log_sums[row]], [self.tempered[row]]
        return Shortlist(ids.tolist(), values.tolist(), sums, tempered, self.vocab)

    def choose(self, row: int, params: SamplingParams, drawn: float) -> int | None:
        """Choose as `choose` does, or return None where it takes all logits."""
        if params.temperature == 0:
            return self.ids[row][0]
        scaled = torch.tensor(self.logits[row], dtype=torch.float64) / params.temperature
        log_sum = self.tempered[row]
        whole = len(scaled) == self.vocab  # whether no token beyond these can be chosen
        if params.top_k is not None:
            if not whole and params.top_k > len(scaled):
                return None
            whole, scaled = True, scaled[: params.top_k]
            log_sum = float(scaled.logsumexp(0))
        probabilities = (scaled - log_sum).exp()
        if not 0 < float(probabilities.sum()) < 2:  # beyond what the sum of logits can tell apart
            return None
        if params.top_p is not None and params.top_p < 1:
            kept = probabilities[probabilities.cumsum(0) - probabilities < params.top_p]
            if not whole and len(kept) == len(probabilities):
                return None
            whole, probabilities = True, kept
        if params.min_p:
            kept = probabilities[probabilities >= params.min_p * probabilities[0]]
            if not whole and len(kept) == len(probabilities):
                return None
            whole, probabilities = True, kept
        if not whole and drawn >= float(probabilities.sum()):
            return None
        share = drawn if whole else drawn / float(probabilities.sum())
        return self.ids[row][_place(probabilities, share)]

    def logprob(self, row: int, token_id: int, logits: Tensor) -> float:
        """Logarithm of a token's probability at temperature one, by its row's logits `(vocab,)`."""
        listed, ids = self.logits[row], self.ids[row]
        known = token_id in ids  # to look into a tensor takes longer
        logit = listed[ids.index(token_id)] if known else float(logits[token_id])
        return logit - self.log_sums[row]

    def top_logprobs(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """Ids and logprobs of a row's likeliest tokens, at temperature one."""
        best = zip(self.ids[row][:count], self.logits[row][:count], strict=True)
        return tuple((token_id, logit - self.log_sums[row]) for token_id, logit in best)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits, `(rows, count)` each, of the `count` highest of `(rows, vocab)`, in order."""
    if _native(logits):
        return cpu.likeliest(logits, count)
    values, ids = logits.topk(count)
    return ids.cpu(), values.cpu()


def log_sums(logits: Tensor, scale: float = 1.0) -> Tensor:
    """Logarithm of the summed exponentials of `(rows, vocab)` logits times `scale`, `(rows,)`."""
    if _native(logits):
        return cpu.log_sums(logits, scale)
    return (logits * scale).logsumexp(-1).cpu()


def _native(logits: Tensor) -> bool:
    return logits.is_cpu and cpu.available()
