"""Texts that are continued together: rows of a batch, which may join and leave between tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moescope.engine.not_finite import NotFinite, not_finite
from moescope.engine.sampling import Choice, SamplingParams
from moescope.engine.stopping import StopFinder
from moescope.model.cache import Cache
from moescope.model.recorder import Recorder
from moescope.text.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from moescope.engine.engine import Engine

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


class Row:
    """One prompt on its way: its ids so far, its chance, and the text it has let out.

    Attributes:
        number: what its tokens call it.
        ids: of the prompt and of all that was made of it.
        prompt_tokens: how many of them were given.
        params: how it is continued.
        generator: its source of chance.
        room: tokens that may still be made.
        ended: whether its last token was made.
    """

    def __init__(
        self,
        engine: "Engine",
        number: int,
        prompt: Sequence[int],
        params: SamplingParams,
        slots: int | None = None,  # of the cache, where there are fewer than the context has
    ) -> None:
        self.number = number
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        context = engine.model.config.max_position_embeddings
        readable = context if slots is None else min(context, slots)
        self.room = min(params.max_tokens, readable + 1 - len(prompt))
        self.ended = False
        self._special_ids = engine.tokenizer.special_ids
        self._end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else engine.end_ids)}
        self._decoder = StreamDecoder(engine.tokenizer)
        self._stop = StopFinder(params.stop)

    def append(self, choice: Choice) -> Token:
        """Add a token; tell what text it made certain and whether the row ends with it."""
        self.ids.append(choice.id)
        self.room -= 1
        at_end = choice.id in self._end_ids
        text = self._stop.feed("" if at_end else self._decoder.feed(choice.id))
        if choice.id in self._special_ids:  # no stop text goes on beyond it
            text += self._stop.feed("", final=True)
        reason: FinishReason | None = None
        if at_end or self._stop.found:
            reason = "stop"
        elif not self.room:
            reason = "length"
        if reason is not None:
            text += self._stop.feed(self._decoder.flush(), final=True)
            reason = "stop" if self._stop.found else reason
            self.ended = True
        return Token(self.number, choice.id, text, choice.logprob, reason, choice.top_logprobs)


class Batch:
    """Rows that get a token each at every step, and the cache of what they have read.

    All of a row's ids are in the cache but the last.
    """

    def __init__(self, engine: "Engine") -> None:
        self.rows: list[Row] = []
        self.cache = Cache()
        self._engine = engine

    def start(
        self, rows: Sequence[Row], recorder: Recorder | None = None
    ) -> Iterator[Token | NotFinite]:
        """Read the prompts of rows together, as the first of this batch; yield as `step`."""
        longest = max((len(row.ids) for row in rows), default=0)
        # Padding stands behind a row's tokens, where none of them sees it.
        padded = [[*row.ids, *[row.ids[-1]] * (longest - len(row.ids))] for row in rows]
        input_ids = self._engine.tensor(padded)  # (batch, longest)
        positions = self._engine.tensor([list(range(longest))] * len(rows))
        self.rows = list(rows)
        if rows:
            last = [len(row.ids) - 1 for row in rows]
            yield from self._continue(input_ids, positions, last, recorder)

    def join(self, row: Row, read: Cache) -> None:
        """Add a row of which all but the last id were read into a cache, which is taken over."""
        if self.rows:
            self.cache.join(read)
        else:
            self.cache = read
        self.rows.append(row)

    def step(self, recorder: Recorder | None = None) -> Iterator[Token | NotFinite]:
        """Read each row's last token and yield the next; rows that end leave the batch.

        A row of which the model makes no numbers ends with a sentence instead of a token.
        """
        input_ids = self._engine.tensor([[row.ids[-1]] for row in self.rows])
        positions = self._engine.tensor([[len(row.ids) - 1] for row in self.rows])
        yield from self._continue(input_ids, positions, [0] * len(self.rows), recorder)

    def remove(self, rows: Sequence[Row]) -> None:
        """Let rows go before their end; each may join again, once its ids have been read again."""
        self._retain([at for at, row in enumerate(self.rows) if row not in rows])

    def _continue(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        last: Sequence[int],
        recorder: Recorder | None,
    ) -> Iterator[Token | NotFinite]:
        hidden_states = self._engine.transform(input_ids, positions, self.cache, recorder)
        last_states = hidden_states[torch.arange(len(self.rows)), last]  # (batch, hidden)
        logits = self._engine.predict(last_states)  # (batch, vocab)
        choices = self._engine.pick(logits, self.rows)
        for row, choice in zip(self.rows, choices, strict=True):
            if choice is None:
                row.ended = True
                yield not_finite(self._engine.model, row.ids)
            else:
                yield row.append(choice)
        alive = [at for at, row in enumerate(self.rows) if not row.ended]
        if len(alive) < len(self.rows):
            self._retain(alive)

    def _retain(self, places: Sequence[int]) -> None:
        self.rows = [self.rows[at] for at in places]
        longest = max((len(row.ids) for row in self.rows), default=0)
        self.cache.keep(self._engine.tensor(places), longest)
