"""A text token by token, as it is read and made: what each token took, and what may follow it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.sequence import FinishReason
from moescope.model.decoder import CausalLM
from moescope.scope.parts import WHOLE, Parts
from moescope.scope.recording import (
    TraceRecorder,
    chosen,
    parameters_used,
    shared_share,
)
from moescope.scope.trace import Candidate
from moescope.text.tokenizer import Tokenizer

CANDIDATES = 10


@dataclass(frozen=True)
class LayerStep:
    """What one mixture-of-experts layer did with one token.

    Attributes:
        topk_ids: the chosen experts, the heaviest first.
        topk_weights: what each one's output was multiplied by.
        shared_share: length of the shared experts' output over the sum of the lengths of theirs
            and the routed experts'; 0 without shared experts.
    """

    topk_ids: list[int]
    topk_weights: list[float]
    shared_share: float


@dataclass(frozen=True)
class TokenStep:
    """One token of a text and what it took.

    Attributes:
        index: place in the text, from 0.
        id: in the vocabulary.
        text: its spelling; a piece of a character reads U+FFFD.
        bytes: its UTF-8 bytes.
        in_prompt: whether it was given, not made.
        special: whether it steers rather than spells.
        logprob: natural logarithm of the probability that the model gave it; None for the first.
        parameters_used: weights that worked on it.
        layers: per layer; None where the layer is dense.
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
    candidates: list[Candidate]


@dataclass(frozen=True)
class End:
    """How a text ended.

    Attributes:
        finish_reason: "stop" at an end token, "length" at `max_tokens` or the context's end.
        prompt_tokens, new_tokens: how many there are.
        seconds: that reading and making the new tokens took, without describing them.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    seconds: float


@torch.inference_mode()
def stream(
    engine: Engine,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    known: int = 0,
    parts: Parts = WHOLE,
) -> Iterator[TokenStep | End]:
    """Continue `prompt_ids` as `Engine.repeat` does; yield every token once it has been read.

    Args:
        engine: that continues.
        prompt_ids: the prompt.
        params: how it is continued.
        known: tokens at the beginning that are read, too, but not told.
        parts: in which all is computed.

    The prompt's tokens come first, then each that is made, then the end. A made token is known
    before it is read, but what the layers do with it is not: so one more token is asked for than
    `params.max_tokens`, which has the last one read, and is dropped.
    """
    recorder = TraceRecorder()
    describe = Describer(engine.model, engine.tokenizer, len(prompt_ids), known, parts)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else engine.end_ids)}
    asked = replace(params, max_tokens=params.max_tokens + 1, stop_token_ids=(), ignore_eos=True)
    made = engine.watch(prompt_ids, asked, recorder, parts.tokens)
    new_tokens, seconds = 0, 0.0
    reason: FinishReason = "length"
    while True:
        start = time.perf_counter()
        ids, token = next(made)
        seconds += time.perf_counter() - start if new_tokens else 0.0
        if ids:
            yield from describe(recorder, ids)
        parts.pause()
        if token is None:
            continue
        if reason == "stop" or new_tokens == params.max_tokens or token.finish_reason is not None:
            break
        new_tokens += 1
        if token.id in ends:
            reason = "stop"
    yield End(reason, len(prompt_ids), new_tokens, seconds)


@torch.inference_mode()
def read(engine: Engine, ids: Sequence[int]) -> list[TokenStep]:
    """Describe all tokens of a text at once, as `stream` yields those of a prompt."""
    recorder = TraceRecorder()
    engine.model(torch.tensor([list(ids)], device=engine.device), recorder=recorder)
    return describe(engine.model, engine.tokenizer, recorder, ids)


@torch.inference_mode()
def describe(
    model: CausalLM,
    tokenizer: Tokenizer,
    recorder: TraceRecorder,
    ids: Sequence[int],
    parts: Parts = WHOLE,
) -> list[TokenStep]:
    """Describe all tokens of a text, each of which the recorder has seen."""
    return list(Describer(model, tokenizer, len(ids), parts=parts)(recorder, ids))


class Describer:
    """Turns what a recorder saw of the next tokens of a text into steps, in order.

    The first `known` tokens of the text make no steps.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        known: int = 0,
        parts: Parts = WHOLE,
    ) -> None:
        self.model, self.tokenizer, self.prompt_tokens = model, tokenizer, prompt_tokens
        self.known, self.parts = known, parts
        self._ids: list[int] = []
        self._last = torch.empty(0)  # (1, vocab) log probabilities after the last token described

    def __call__(self, recorder: TraceRecorder, ids: Sequence[int]) -> Iterator[TokenStep]:
        """Describe the `ids` that the recorder has just seen."""
        used = parameters_used(self.model, recorder.routings, len(ids)).tolist()
        layers = [_layer_steps(recorder, layer_idx) for layer_idx in recorder.hidden_states]
        states = list(recorder.hidden_states.values())[-1]  # after the last layer
        at_once = self.parts.rows
        # What comes before the first step says how likely that one was.
        untold = min(len(ids), max(0, self.known - 1 - len(self._ids)))
        self._ids.extend(ids[:untold])
        for start in range(untold, len(ids), at_once):
            part = slice(start, start + at_once)
            logits = self.model.logits(self.model.model.norm(states[part]))  # (tokens, vocab)
            logprobs, candidates = self._predictions(logits, ids[part])
            rows = zip(ids[part], logprobs, candidates, strict=True)
            for offset, (token_id, logprob, guesses) in enumerate(rows, start):
                index = len(self._ids)
                self._ids.append(token_id)
                if index < self.known:
                    continue
                yield TokenStep(
                    index=index,
                    id=token_id,
                    text=spell(self.tokenizer, token_id),
                    bytes=list(self.tokenizer.token_bytes(token_id)),
                    in_prompt=index < self.prompt_tokens,
                    special=token_id in self.tokenizer.special_ids,
                    logprob=logprob,
                    parameters_used=used[offset],
                    layers=[None if layer is None else layer[offset] for layer in layers],
                    candidates=guesses,
                )
            self.parts.pause()

    def _predictions(
        self, logits: Tensor, ids: Sequence[int]
    ) -> tuple[list[float | None], list[list[Candidate]]]:
        """How likely each of `ids` was before it came, and the guesses at what follows it.

        `logits` are those after each of them, `(tokens, vocab)`.
        """
        after = logits.log_softmax(dim=-1)  # (tokens, vocab)
        before = torch.cat([self._last, after[:-1]]) if len(self._last) else after[:-1]
        self._last = after[-1:]
        came = torch.tensor(ids[len(ids) - len(before) :], dtype=torch.int64, device=after.device)
        logprobs = before.gather(1, came[:, None])[:, 0].tolist()
        best = after.topk(min(CANDIDATES, after.shape[-1]), dim=-1)
        candidates = [
            [
                Candidate(token_id, legible(self.tokenizer, token_id), probability)
                for token_id, probability in zip(row_ids, probabilities, strict=True)
            ]
            for row_ids, probabilities in zip(
                best.indices.tolist(), best.values.exp().tolist(), strict=True
            )
        ]
        return [*[None] * (len(ids) - len(before)), *logprobs], candidates


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token; a piece of a character reads U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def legible(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token, for the eye: a piece of a character reads as its bytes, `E6 9C`."""
    text = spell(tokenizer, token_id)
    return tokenizer.token_bytes(token_id).hex(" ").upper() if "\ufffd" in text else text


def _layer_steps(recorder: TraceRecorder, layer_idx: int) -> list[LayerStep] | None:
    if layer_idx not in recorder.routings:
        return None
    topk_ids, topk_weights = chosen(recorder.routings[layer_idx])
    shares = shared_share(*recorder.outputs[layer_idx])
    return [LayerStep(*step) for step in zip(topk_ids, topk_weights, shares, strict=True)]
