"""Text in, text out: encode -> schedule -> run -> pick, and repeat."""

import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence as Series
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from moescope.engine.blocks import Blocks
from moescope.engine.not_finite import not_finite
from moescope.engine.prompt_logprobs import all_finite
from moescope.engine.runner import Runner, block_tokens, bytes_per_block, short_turn
from moescope.engine.sampling import (
    LONGER,
    Choice,
    SamplingParams,
    Shortlist,
    allowed,
    biased,
    choose,
    draw,
    penalised,
)
from moescope.engine.scheduler import CHUNK, Chunk, Scheduler
from moescope.engine.sequence import FinishReason, Sequence, Token, Writer
from moescope.engine.steered import Steerings
from moescope.errors import UserError
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
        blocks: of the cache, in which all texts lie, those that ended too while there is room.
        runner: what computes.
        steerings: networks whose routers decide otherwise for some texts.
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
        self._lock = RLock()
        self.blocks = Blocks(block_tokens(model.config))
        self.runner = Runner(self.model, self.blocks)
        self.steerings = Steerings(self.model)

    def limit_cache(self, cache_bytes: int) -> None:
        """Hold all texts in a cache of so many bytes; what it held is forgotten.

        Raises:
            UserError: not even one block fits.
        """
        size = block_tokens(self.model.config)
        limit = cache_bytes // bytes_per_block(self.model, size)
        if limit < 1:
            raise UserError(
                f"{cache_bytes:,} bytes of memory are too few for the cache of {size} tokens; "
                "give it more, close other programs or take a smaller model"
            )
        self.blocks = Blocks(size, limit)
        self.runner = Runner(self.model, self.blocks)

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

    def generate(self, prompts: Series[str], params: SamplingParams) -> list[Generation]:
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

    # --- the steps ----------------------------------------------------------------------------

    def encode(self, prompt: str) -> list[int]:
        """Turn text into token ids, with what the tokenizer sets around a text.

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
        """The same for a chat: its form writes all special tokens, and nothing is set around it.

        Raises:
            UserError: there is no chat form, it refuses the messages, or as for `encode`.
        """
        ids = self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, **variables))
        self.check(ids)
        return ids

    def check(self, ids: Series[int]) -> None:
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
                    "give the tokenizer that belongs to the model",
                    "unknown_token",
                    id=token_id,
                    n=vocab_size,
                )
        if len(ids) > limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens but the model's context holds {limit}; "
                "shorten it",
                "context_full",
                n=len(ids),
                max=limit,
            )

    def sequence(
        self,
        ids: Series[int],
        params: SamplingParams,
        number: int = 0,
        request: Hashable = None,
    ) -> Sequence:
        """Make a text of a prompt that can be read.

        Args:
            ids: the prompt.
            params: how it is continued.
            number: what its tokens call it.
            request: whose it is.

        Raises:
            UserError: as for `check`, there is no memory for it, or the model cannot do what its
                steering asks.
        """
        self.check(ids)
        steered = self.steerings.of(params.steering)
        readable, limit = self.model.config.max_position_embeddings, self.blocks.limit
        if limit is not None:
            readable = min(readable, limit * self.blocks.size)
            if len(ids) > readable:
                raise UserError(
                    f"the prompt has {len(ids)} tokens but there is memory for {readable}; "
                    "shorten it",
                    "memory_full",
                    n=len(ids),
                    max=readable,
                )
        end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self.end_ids)}
        room = min(params.max_tokens, readable + 1 - len(ids))
        skip = params.skip_special_tokens
        writer = Writer(self.tokenizer, end_ids, params.stop, skip_special_tokens=skip)
        salt = b"" if steered is None else steered.salt
        return Sequence(list(ids), params, room, number, request, salt, writer, steered)

    def step(
        self, scheduler: Scheduler, recorder: Recorder | None = None
    ) -> list[tuple[Sequence, Token | Exception]]:
        """Read what a scheduler over this engine's blocks chooses; return what was made.

        A text of which the model makes no numbers, or whose choice fails, ends with what went
        wrong, and no other does. With a `recorder`, which sees all that is read, a single text is
        read whole.

        Raises:
            ValueError: the cache has been replaced since the scheduler was made.
        """
        with self._lock, torch.inference_mode():
            if scheduler.blocks is not self.blocks:
                raise ValueError(
                    "this scheduler's blocks are of a cache that `limit_cache` replaced"
                )
            chunks = scheduler.schedule()
            if not chunks:
                return []
            return self.hand_out(scheduler, chunks, self.runner.run(chunks, recorder))

    def hand_out(
        self, scheduler: Scheduler, chunks: Series[Chunk], logits: Tensor
    ) -> list[tuple[Sequence, Token | Exception]]:
        """Give each text whose last chunk was read its next token, by logits `(texts, vocab)`."""
        with self._lock:
            texts = [chunk.sequence for chunk in chunks if chunk.is_last]
            for chunk in chunks:
                scheduler.advance(chunk)
            made: list[tuple[Sequence, Token | Exception]] = []
            for text, choice in zip(texts, self.pick(logits, texts), strict=True):
                try:
                    event = self._told(scheduler, text, choice)
                except Exception as error:
                    event = error
                made.append((text, event))
                text.ended = text.ended or isinstance(event, Exception)
                if text.ended:
                    scheduler.remove(text)
            return made

    def _told(
        self, scheduler: Scheduler, text: Sequence, choice: Choice | Exception | None
    ) -> Token | Exception:
        """What a text is told of its choice."""
        if choice is None or (text.is_new and not all_finite(text.prompt_logprobs)):
            scheduler.blocks.distrust(text)
            return not_finite(self.model, text.ids)
        return choice if isinstance(choice, Exception) else text.append(choice)

    def pick(self, logits: Tensor, texts: Series[Sequence]) -> list[Choice | Exception | None]:
        """Choose each text's next token from `(texts, vocab)` logits.

        There is none, None, where logits are not finite; an exception where choosing failed.
        """
        if not texts:
            return []
        shortlist = Shortlist.of(logits, [text.params for text in texts])
        choices: list[Choice | Exception | None] = []
        for at, text in enumerate(texts):
            if not math.isfinite(shortlist.log_sums[at]):
                choices.append(None)
                continue
            try:
                choices.append(self._choose(logits, shortlist, at, text))
            except Exception as error:
                choices.append(error)
        return choices

    def _choose(self, logits: Tensor, shortlist: Shortlist, at: int, text: Sequence) -> Choice:
        params = text.params
        drawn = draw(text.generator) if params.temperature else 0.0
        row = logits[at]
        scores = self._scores(row, text)  # (vocab,)
        place, likeliest = at, shortlist
        if scores is not row:
            place, likeliest = 0, Shortlist.of(scores[None], [params])
        token_id = likeliest.choose(place, params, drawn)
        for count in LONGER:
            if token_id is None:
                likeliest = likeliest.of_row(place, scores, count)
                place, token_id = 0, likeliest.choose(0, params, drawn)
        if token_id is None:
            token_id = choose(scores.cpu(), params, drawn)
        if text.state is not None:
            text.state.accept(token_id)
        logprob = shortlist.logprob(at, token_id, row)
        return Choice(token_id, logprob, shortlist.top_logprobs(at, params.top_logprobs))

    def _scores(self, logits: Tensor, text: Sequence) -> Tensor:
        """Logits `(vocab,)` with penalties, biases and what a text may be; the same if none is."""
        params, made = text.params, len(text.ids) - text.prompt_tokens
        if params.penalises:
            logits = penalised(logits, text.ids, made, params)
        if params.logit_bias:
            logits = biased(logits, params.logit_bias)
        mask = None if text.state is None else text.state.mask()
        too_soon = set() if text.state is None else set(text.state.too_soon)
        if made < params.min_tokens:
            too_soon |= {*self.end_ids, *params.stop_token_ids}
        if mask is not None or too_soon:
            logits = allowed(logits, mask, too_soon)
        return logits

    def repeat(
        self,
        prompts: Series[Series[int]],
        params: SamplingParams,
    ) -> Iterator[Token]:
        """Step on until every prompt's text has ended; yield tokens as they are made.

        Prompts, as ids, may be of unequal length.

        Raises:
            UserError: a prompt cannot be read, or the model computes what is no number; the
                sentence says where.
        """
        scheduler = Scheduler(self.blocks, chunk=CHUNK, short_turn=short_turn(self.model))
        made: deque[Token] = deque()
        try:
            for number, ids in enumerate(prompts):
                sequence = self.sequence(ids, params, number, request=number)
                if sequence.room:
                    scheduler.add(sequence)
            while scheduler:
                for _, event in self.step(scheduler):
                    if isinstance(event, Exception):
                        raise event
                    made.append(event)
                while made:
                    yield made.popleft()
        finally:
            with self._lock:
                scheduler.clear()

    def watch(
        self,
        ids: Series[int],
        params: SamplingParams,
        recorder: Recorder,
        chunk: int | None = None,
    ) -> Iterator[tuple[list[int], Token | None]]:
        """Continue one prompt while a recorder looks on, which is shown every token of it.

        Args:
            ids: the prompt.
            params: how it is continued.
            recorder: that looks on.
            chunk: tokens of the prompt that are read in one pass; None for all.

        Yields:
            After each pass the tokens that it read, and the one that it made; None while more of
            the prompt is unread, or while others hold the memory that the next token takes. What
            was read before and has to be read again is neither shown nor yielded once more.

        Raises:
            UserError: as `repeat`.
        """
        scheduler = Scheduler(self.blocks, chunk=chunk, reuse=False)
        text = self.sequence(ids, params)
        shown = 0
        try:
            scheduler.add(text)
            while scheduler:
                known, again = list(text.ids), shown - text.read
                scheduler.chunk = chunk if again <= 0 else min(again, chunk or again)
                made = self.step(scheduler, recorder if again <= 0 else Recorder())
                event = made[0][1] if made else None
                if isinstance(event, Exception):
                    raise event
                read = known if made else known[: text.read]
                yield read[shown:], event
                shown = max(shown, len(read))
        finally:
            with self._lock:
                scheduler.clear()
