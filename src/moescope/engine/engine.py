"""Text in, text out: encode -> transform -> predict -> pick, and repeat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moescope.engine.batch import Batch, FinishReason, Row, Token
from moescope.engine.not_finite import NotFinite
from moescope.engine.sampling import Choice, SamplingParams, Shortlist, choose, draw, penalised
from moescope.errors import UserError
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.text.chat import Messages
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """A finished continuation of one prompt."""

    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish_reason: FinishReason


class Engine:
    """Continues prompts with a model and its tokenizer.

    Attributes:
        end_ids: tokens that end a text: those of the config, of the tokenizer and of `defaults`.
        defaults: what the model's files say of the texts that it makes.
        own_tokenizer: the model's; None where it has none, and computes with ids alone.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.model = model.eval()
        self.own_tokenizer = tokenizer
        self.defaults = defaults or GenerationDefaults()
        self.device = model.lm_head.weight.device
        self.end_ids = self.defaults.all_ends(
            model.config.eos_token_id, tokenizer and tokenizer.eos_id
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids and back.

        Raises:
            UserError: the model has none.
        """
        if self.own_tokenizer is None:
            raise UserError(
                "this model has no tokenizer, so it reads and writes no text; put its "
                "tokenizer.json beside its weights",
                "no_tokenizer",
            )
        return self.own_tokenizer

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
        """Step 1: turn text into token ids, with what the tokenizer sets around a text.

        A prompt that begins so already, as a chat form does, is left as it is.

        Raises:
            UserError: the prompt is empty or longer than the model's context.
        """
        ids, begin = self.tokenizer.encode(prompt), list(self.tokenizer.begin_ids)
        if not begin or ids[: len(begin)] != begin:
            ids = [*begin, *ids, *self.tokenizer.end_ids]
        self.check(ids)
        return ids

    def encode_chat(self, messages: Messages, **variables: Any) -> list[int]:
        """Step 1 for a chat: its form writes all special tokens, and nothing is set around it.

        Raises:
            UserError: there is no chat form, it refuses the messages, or as for `encode`.
        """
        ids = self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, **variables))
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Refuse a prompt, as ids, that the model cannot read.

        Raises:
            UserError: there are none, too many for the context, or one the model does not know.
        """
        vocab_size, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if not ids:
            raise UserError(
                "the prompt is empty and the model has no begin token; give some text",
                "prompt_empty",
            )
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < vocab_size:
                raise UserError(
                    f"the prompt holds token {token_id} but the model knows only {vocab_size}; "
                    "give the tokenizer that belongs to the model"
                )
        if len(ids) > limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens but the model's context holds {limit}; "
                "shorten it",
                "context_full",
                n=len(ids),
                max=limit,
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

    def pick(self, logits: Tensor, rows: Sequence[Row]) -> list[Choice | None]:
        """Step 4: choose each row's next token from `(batch, vocab)` logits.

        There is none, None, where logits are not finite.
        """
        shortlist = Shortlist.of(logits, [row.params.temperature for row in rows])
        finite = shortlist.log_sums.isfinite().tolist()
        choices: list[Choice | None] = []
        for at, row in enumerate(rows):
            if not finite[at]:
                choices.append(None)
                continue
            drawn = draw(row.generator) if row.params.temperature else 0.0
            scores, place, likeliest = logits[at], at, shortlist  # scores (vocab,)
            if row.params.penalises:
                made = len(row.ids) - row.prompt_tokens
                scores = penalised(scores, row.ids, made, row.params)
                place, likeliest = 0, Shortlist.of(scores[None], [row.params.temperature])
            token_id = likeliest.choose(place, row.params, drawn)
            if token_id is None:
                token_id = choose(scores.cpu(), row.params, drawn)
            logprob = shortlist.logprob(at, float(logits[at, token_id]))
            top_logprobs = shortlist.top_logprobs(at, row.params.top_logprobs)
            choices.append(Choice(token_id, logprob, top_logprobs))
        return choices

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

        Raises:
            UserError: the model computes what is no number; the sentence says where.
        """
        rows = [Row(self, number, ids, params) for number, ids in enumerate(prompts)]
        batch = Batch(self)
        events = batch.start([row for row in rows if row.room], recorder)
        while True:
            for event in events:
                if isinstance(event, NotFinite):
                    raise event
                yield event
            if not batch.rows:
                return
            events = batch.step(recorder)

    def tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Put ids or positions where the model computes."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
