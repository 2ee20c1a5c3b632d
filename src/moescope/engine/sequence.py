"""One text on its way: what is known of it, and how its tokens become text."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from moescope.engine.constraint import State
from moescope.engine.sampling import Choice, SamplingParams
from moescope.engine.stopping import StopFinder
from moescope.text.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


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
        top_logprobs: ids and logprobs of the likeliest tokens, as many as were asked for.
    """

    row: int
    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


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
        read: how many of them, from the first, are in the cache.
        blocks: of the cache, in order.
        digests: of all tokens before each block that has been begun.
        reused: tokens of the prompt that had been read before.
        cancelled: whether nobody waits for it any more.
        ended: whether its last token was made.
        state: how far it is in what it must be; None if it may be anything.
    """

    ids: list[int]
    params: SamplingParams
    room: int
    number: int = 0
    request: Hashable = None
    salt: bytes = b""
    writer: "Writer | None" = None
    prompt_tokens: int = field(init=False)
    read: int = 0
    blocks: list[int] = field(default_factory=list[int])
    digests: list[bytes] = field(default_factory=list[bytes])
    reused: int = 0
    cancelled: bool = False
    ended: bool = False
    state: State | None = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        constraint = self.params.constraint
        self.state = None if constraint is None else constraint.start()

    @property
    def unread(self) -> int:
        """Tokens to be read before the next is known."""
        return len(self.ids) - self.read

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

    def append(self, choice: Choice) -> Token:
        """Add a token; tell what text it made certain and whether the text ends with it."""
        self.ids.append(choice.id)
        self.room -= 1
        assert self.writer is not None
        complete = self.state is not None and self.state.ended
        text, stops = self.writer.write(choice.id, final=complete or not self.room)
        reason: FinishReason | None = None if self.room else "length"
        reason = "stop" if stops or complete else reason
        self.ended = reason is not None
        return Token(self.number, choice.id, text, choice.logprob, reason, choice.top_logprobs)


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

    def write(self, token_id: int, *, final: bool) -> tuple[str, bool]:
        """Take the next token; return the text that it made certain, and whether it stops there.

        With `final` no more tokens come.
        """
        at_end = token_id in self._end_ids
        text = self._stop.feed("" if at_end else self._decoder.feed(token_id))
        if token_id in self._special_ids:  # no stop text goes on beyond it
            text += self._stop.feed("", final=True)
        if at_end or final or self._stop.found:
            text += self._stop.feed(self._decoder.flush(), final=True)
        return text, at_end or self._stop.found
