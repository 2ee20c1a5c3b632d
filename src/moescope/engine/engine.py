"""Text in, text out: encode -> transform -> predict -> pick, and repeat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moescope.engine.cache import Cache
from moescope.engine.sampling import SamplingParams, Shortlist, choose, draw
from moescope.engine.stopping import StopFinder
from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.tokenizer import StreamDecoder, Tokenizer

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
            at `max_tokens` or where the model's context ends.
    """

    row: int
    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """A finished continuation of one prompt."""

    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish_reason: FinishReason


class Engine:
    """Continues prompts with a model and its tokenizer."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = model.lm_head.weight.device
        eos = model.config.eos_token_id
        self.end_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id} - {None}

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Generation]:
        """Continue every prompt to its end; a prompt's text does not depend on the others.

        Raises:
            UserError: a prompt is empty or leaves no room in the model's context.
        """
        input_ids = [self.encode(prompt) for prompt in prompts]
        made: list[list[Token]] = [[] for _ in prompts]
        for token in self.repeat(input_ids, params):
            made[token.row].append(token)
        return [
            Generation(
                text="".join(token.text for token in tokens),
                tokens=tuple(tokens),
                prompt_tokens=len(ids),
                finish_reason=(tokens[-1].finish_reason if tokens else None) or "length",
            )
            for tokens, ids in zip(made, input_ids, strict=True)
        ]

    # --- the five steps -----------------------------------------------------------------------

    def encode(self, prompt: str) -> list[int]:
        """Step 1: turn text into token ids, with the begin token if the model was taught one.

        Raises:
            UserError: the prompt is empty or longer than the model's context.
        """
        ids = self.tokenizer.encode(prompt)
        bos_id = self.tokenizer.bos_id
        if self.tokenizer.adds_bos and bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Refuse a prompt, as ids, that the model cannot read.

        Raises:
            UserError: there are none, too many for the context, or one the model does not know.
        """
        vocab_size, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if not ids:
            raise UserError("the prompt is empty and the model has no begin token; give some text")
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < vocab_size:
                raise UserError(
                    f"the prompt holds token {token_id} but the model knows only {vocab_size}; "
                    "give the tokenizer that belongs to the model"
                )
        if len(ids) > limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens but the model's context holds {limit}; "
                "shorten it"
            )

    def transform(
        self, input_ids: Tensor, positions: Tensor, cache: Cache, recorder: Recorder | None = None
    ) -> Tensor:
        """Step 2: run new tokens through all layers.

        Maps ids `(batch, seq)` at `positions` `(batch, seq)` to hidden states
        `(batch, seq, hidden)`; earlier tokens are read from the cache, new ones added to it.
        """
        return self.model(input_ids, positions, cache, recorder)

    def predict(self, hidden_states: Tensor) -> Tensor:
        """Step 3: turn the last tokens' hidden states `(batch, hidden)` into logits over the
        vocabulary, `(batch, vocab)` float32.
        """
        return self.model.logits(hidden_states)

    def pick(
        self,
        logits: Tensor,
        seen: Sequence[Sequence[int]],
        params: SamplingParams,
        generators: Sequence[torch.Generator],
    ) -> list[tuple[int, float]]:
        """Step 4: choose each row's next token from `(batch, vocab)` logits.

        `seen` are each row's ids so far; `generators` each row's source of chance. Returns ids
        with the logarithms of their probabilities.
        """
        shortlist = Shortlist.of(logits, params.temperature)
        picked: list[tuple[int, float]] = []
        for row, (ids, generator) in enumerate(zip(seen, generators, strict=True)):
            drawn = draw(generator) if params.temperature else 0.0
            token_id = shortlist.choose(row, params, drawn)
            if token_id is None:
                token_id = choose(logits[row].cpu(), torch.tensor(ids), params, drawn)
            picked.append((token_id, shortlist.logprob(row, float(logits[row, token_id]))))
        return picked

    @torch.inference_mode()
    def repeat(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        recorder: Recorder | None = None,
    ) -> Iterator[Token]:
        """Step 5: append each row's token and go on until every row has ended.

        Prompts, as ids, may be of unequal length. Tokens come out as they are made. When one
        does, a `recorder` has been shown what was read for it: all prompts before the rows'
        first tokens, then each row's last token.
        """
        rows = [_Row(self, number, ids, params) for number, ids in enumerate(prompts)]
        rows = [row for row in rows if row.room]
        cache = Cache()
        input_ids, positions, last = self._padded(rows)
        while rows:
            hidden_states = self.transform(input_ids, positions, cache, recorder)
            last_states = hidden_states[torch.arange(len(rows)), last]  # (batch, hidden)
            logits = self.predict(last_states)  # (batch, vocab)
            picked = self.pick(logits, [r.ids for r in rows], params, [r.generator for r in rows])
            for row, (token_id, logprob) in zip(rows, picked, strict=True):
                yield row.append(token_id, logprob)
            alive = [at for at, row in enumerate(rows) if not row.ended]
            if len(alive) < len(rows):
                rows = [rows[at] for at in alive]
                cache.keep(torch.tensor(alive, dtype=torch.int64, device=self.device))
            input_ids = self._tensor([[row.ids[-1]] for row in rows])
            positions = self._tensor([[len(row.ids) - 1] for row in rows])
            last = torch.zeros(len(rows), dtype=torch.int64, device=self.device)

    def _padded(self, rows: "Sequence[_Row]") -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and positions, `(batch, longest)`, and each row's last place, `(batch,)`.

        Padding stands behind a row's tokens, where none of them sees it.
        """
        longest = max((len(row.ids) for row in rows), default=0)
        ids = [[*row.ids, *[row.ids[-1]] * (longest - len(row.ids))] for row in rows]
        positions = [list(range(longest))] * len(rows)
        return (
            self._tensor(ids),
            self._tensor(positions),
            self._tensor([len(r.ids) - 1 for r in rows]),
        )

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


class _Row:
    """One prompt on its way: its ids so far, its chance, and the text it has let out."""

    def __init__(
        self, engine: Engine, number: int, prompt: Sequence[int], params: SamplingParams
    ) -> None:
        self.number = number
        self.ids = list(prompt)
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        context = engine.model.config.max_position_embeddings
        self.room = min(params.max_tokens, context + 1 - len(prompt))
        self.ended = False
        self._end_ids = engine.end_ids | set(params.stop_token_ids)
        self._decoder = StreamDecoder(engine.tokenizer)
        self._stop = StopFinder(params.stop)

    def append(self, token_id: int, logprob: float) -> Token:
        """Add a token; tell what text it made certain and whether the row ends with it."""
        self.ids.append(token_id)
        self.room -= 1
        at_end = token_id in self._end_ids
        text = self._stop.feed("" if at_end else self._decoder.feed(token_id))
        reason: FinishReason | None = None
        if at_end or self._stop.found:
            reason = "stop"
        elif not self.room:
            reason = "length"
        if reason is not None:
            text += self._stop.feed(self._decoder.flush(), final=True)
            reason = "stop" if self._stop.found else reason
            self.ended = True
        return Token(self.number, token_id, text, logprob, reason)
