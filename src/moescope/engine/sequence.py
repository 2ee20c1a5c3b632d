"""One text on its way: what is known of it, and how its tokens become text."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.constraint import State
from moescope.engine.sampling import Choice, SamplingParams
from moescope.engine.steered import Steered
from moescope.engine.stopping import StopFinder
from moescope.text.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PromptLogprob:
    """How likely a given token was, after those before it.

    Attributes:
        id: of the token.
        logprob: natural logarithm of its probability.
        rank: its place among all tokens, the likeliest being 1.
        top_logprobs: ids and logprobs of the likeliest tokens, as many as were asked for.
    """

    id: int
    logprob: float
    rank: int
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RoutedTokens:
    """Which experts served tokens of a text that were read, in each layer that has routers.

    Attributes:
        start: place of the first of them in the text.
        layers: those layers, by index.
        ids: `(tokens, layers, slots)` int16, -1 in a slot that no expert is left for.
        weights: `(tokens, layers, slots)` float32.
        scores: the same before they became weights.
    """

    start: int
    layers: tuple[int, ...]
    ids: Tensor
    weights: Tensor
    scores: Tensor

    @classmethod
    def join(cls, parts: "Iterable[RoutedTokens]") -> "RoutedTokens":
        """Put together what follows each other, at least one part."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        slots = max(part.ids.shape[-1] for part in parts)

        def joined(tensors: list[Tensor], value: int = 0) -> Tensor:
            widths = {tensor.shape[-1] for tensor in tensors}
            if len(widths) > 1:
                tensors = [F.pad(t, (0, slots - t.shape[-1]), value=value) for t in tensors]
            return torch.cat(tensors)

        return cls(
            parts[0].start,
            parts[0].layers,
            joined([part.ids for part in parts], value=-1),
            joined([part.weights for part in parts]),
            joined([part.scores for part in parts]),
        )


@dataclass(frozen=True)
class Token:
    """One token of a continuation, as it is made.

    Attributes:
        row: which prompt of the batch it continues.
        id: in the vocabulary.
        text: what became certain with it; "" in the middle of a character or of a possible stop.
        logprob: natural logarithm of its probability, before temperature and filters.
        finish_reason: set on a row's last token: "stop" at an end token or stop text, "length"
            at `max_tokens` or where the model's context or the memory for it ends.
        stop: the stop text that ended a row; None where none did.
        top_logprobs: ids and logprobs of the likeliest tokens, as many as were asked for.
        prompt_logprobs: with a row's first token, what is known of each token of its prompt, if it
            was asked for; None for the first, which follows nothing.
        routed: of the tokens that were read for it, if it was asked for: a row's whole prompt with
            its first token, then the token before. The last that is made is read no more.
    """

    row: int
    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[PromptLogprob | None, ...] | None = None
    routed: RoutedTokens | None = None
    stop: str | None = None


@dataclass(eq=False)
class Sequence:
    """One text: its ids so far, where they lie in the cache, and the chance that it takes.

    Attributes:
        ids: of the prompt and of all that was made of it.
        params: how it is continued.
        room: tokens that may still be made.
        number: what its tokens call it.
        request: whose it is; requests take turns, however many texts they have.
        salt: texts of different salt share nothing of the cache.
        writer: turns its tokens into text.
        prompt_tokens: how many of the ids were given.
        given: how many of them, from the first, are read as a prompt; those of a short turn of a
            conversation are read as made tokens are, one by one.
        read: how many of them, from the first, are in the cache.
        blocks: of the cache, in order.
        digests: of all tokens before each block that has been begun.
        reused: tokens of the prompt that had been read before.
        cancelled: whether nobody waits for it any more.
        ended: whether its last token was made.
        state: how far it is in what it must be; None if it may be anything.
        prompt_logprobs: what is known of its prompt's tokens so far; None if nobody asks.
        steered: routers of its own, if it has such.
        routed_tokens: of how many, from the first, it has been told which experts served them.
    """

    ids: list[int]
    params: SamplingParams
    room: int
    number: int = 0
    request: Hashable = None
    salt: bytes = b""
    writer: "Writer | None" = None
    steered: Steered | None = None
    prompt_tokens: int = field(init=False)
    given: int = field(init=False)
    read: int = 0
    blocks: list[int] = field(default_factory=list[int])
    digests: list[bytes] = field(default_factory=list[bytes])
    reused: int = 0
    cancelled: bool = False
    ended: bool = False
    state: State | None = field(init=False)
    prompt_logprobs: list[PromptLogprob | None] | None = field(init=False)
    routed_tokens: int = 0
    _routed: list[RoutedTokens] = field(default_factory=list[RoutedTokens])

    def __post_init__(self) -> None:
        self.prompt_tokens = self.given = len(self.ids)
        constraint = self.params.constraint
        self.state = None if constraint is None else constraint.start()
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else [None]

    @property
    def is_read_whole(self) -> bool:
        """Whether something of each token is wanted, so that none may be taken for known."""
        return self.prompt_logprobs is not None or self.params.routed_experts

    @property
    def unread(self) -> int:
        """Tokens to be read before the next is known."""
        return len(self.ids) - self.read

    @property
    def unread_prompt(self) -> int:
        """Those of them that are read as a prompt."""
        return max(0, self.given - self.read)

    @property
    def is_new(self) -> bool:
        """Whether it has been given no token yet."""
        return len(self.ids) == self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether all that is unread is the token that was made last."""
        return self.unread == 1 and not self.is_new

    @cached_property
    def generator(self) -> torch.Generator:
        """Its source of chance."""
        generator = torch.Generator()
        if self.params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.params.seed)
        return generator

    def add_routed(self, routed: RoutedTokens) -> None:
        """Be told which experts served the next of its tokens."""
        self._routed.append(routed)
        self.routed_tokens += len(routed.ids)

    def append(self, choice: Choice) -> Token:
        """Add a token; tell what text it made certain and whether the text ends with it."""
        prompt = tuple(self.prompt_logprobs) if self.is_new and self.prompt_logprobs else None
        self.ids.append(choice.id)
        self.room -= 1
        assert self.writer is not None
        complete = self.state is not None and self.state.ended
        text, stops = self.writer.write(choice.id, final=complete or not self.room)
        reason: FinishReason | None = None if self.room else "length"
        reason = "stop" if stops or complete else reason
        self.ended = reason is not None
        routed = RoutedTokens.join(self._routed) if self._routed else None
        self._routed.clear()
        top = choice.top_logprobs
        stop = self.writer.found
        return Token(
            self.number, choice.id, text, choice.logprob, reason, top, prompt, routed, stop
        )


class Writer:
    """Turns the tokens of one text into text, up to an end token or a stop text.

    Args:
        tokenizer: the model's.
        end_ids: tokens that end it and are not written.
        stop: texts that end it and are left out.
        skip_special_tokens: whether special tokens leave no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        stop: Iterable[str],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._special_ids, self._end_ids = tokenizer.special_ids, frozenset(end_ids)
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = StopFinder(tuple(stop))

    @property
    def found(self) -> str | None:
        """The stop text that ended the text, if one did."""
        return self._stop.found

    def write(self, token_id: int, *, final: bool) -> tuple[str, bool]:
        """Take the next token; return the text that it made certain, and whether it stops there.

        With `final` no more tokens come.
        """
        at_end = token_id in self._end_ids
        text = self._stop.feed("" if at_end else self._decoder.feed(token_id))
        if token_id in self._special_ids:  # no stop text goes on beyond it
            text += self._stop.feed("", final=True)
        stops = at_end or self._stop.found is not None
        if stops or final:
            text += self._stop.feed(self._decoder.flush(), final=True)
        return text, stops or self._stop.found is not None
