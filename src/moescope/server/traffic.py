"""The requests that came of late, for the page: few of them, little of each, in memory alone.

Only a server that was asked to watch keeps any. The event loop alone changes it.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moescope.engine.sampling import SamplingParams
from moescope.engine.sequence import Token
from moescope.server.requests import NotThere
from moescope.server.schema import (
    ExpertId,
    SteeringRequest,
    TrafficEvent,
    WatchedAnswer,
    WatchedRequest,
    WatchedState,
    WatchedText,
)
from moescope.text.tokenizer import Tokenizer

MAX_REQUESTS = 50
MAX_TEXTS = 8
"""Of one request, that are shown."""
MAX_PICTURE = 1024
"""Tokens of a prompt and its answer that are kept, and that the page reads again as a picture."""
MAX_SHOWN = 160
"""Characters of a prompt or an answer in the list."""
ENCODED = 96
"""Tokens of a prompt that are spelled for the list."""


@dataclass
class _Text:
    """One answer, as far as it is kept.

    Attributes:
        ids: of the prompt and the answer; None once there are more than `MAX_PICTURE`.
        prompt_tokens, new_tokens: how many there are, kept or not.
        prompt, answer: their beginnings.
    """

    ids: "array[int] | None"
    prompt_tokens: int
    prompt: str
    answer: str = ""
    new_tokens: int = 0

    def add(self, token: Token) -> None:
        self.new_tokens += 1
        self.answer = (self.answer + token.text)[:MAX_SHOWN]
        if self.ids is not None and len(self.ids) < MAX_PICTURE:
            self.ids.append(token.id)
        else:
            self.ids = None


@dataclass
class Watched:
    """One request, from when it came."""

    traffic: "Traffic"
    number: int
    path: str
    texts: list[_Text]
    count: int
    prompt_tokens: int
    steering: SteeringRequest
    came: float = field(default_factory=time.time)
    state: WatchedState = "waiting"
    new_tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    def add(self, token: Token) -> None:
        """Note a token."""
        self.last = time.perf_counter()
        if not self.new_tokens:
            self.first, self.state = self.last, "running"
        self.new_tokens += 1
        if token.row < len(self.texts):
            self.texts[token.row].add(token)
        self.traffic.note(self)

    def end(self, state: WatchedState) -> None:
        """Note how it ended; what was noted first counts."""
        if self.state in ("waiting", "running"):
            self.state = state
            self.traffic.note(self)

    @property
    def shown(self) -> WatchedRequest:
        """What the list tells of it."""
        seconds = self.last - self.first
        return WatchedRequest(
            number=self.number,
            path=self.path,
            came=self.came,
            state=self.state,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            tokens_per_second=(self.new_tokens - 1) / seconds if seconds > 0 else None,
            count=self.count,
            steered=self.steering != SteeringRequest(),
            texts=[
                WatchedText(
                    prompt=text.prompt,
                    answer=text.answer,
                    new_tokens=text.new_tokens,
                    kept=text.ids is not None,
                )
                for text in self.texts
            ],
        )


class Traffic:
    """The last `MAX_REQUESTS` requests.

    Args:
        tokenizer: of the model that is asked.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: OrderedDict[int, Watched] = OrderedDict()
        self._changed: dict[int, int] = {}  # number of a request: when it last changed
        self._clock = self._count = 0

    def begin(
        self, path: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> Watched:
        """Watch a request for each of `prompts` in all ways of `params`."""
        each = [prompt for prompt in prompts for _ in params]
        texts = [
            _Text(
                array("l", prompt) if len(prompt) <= MAX_PICTURE else None,
                len(prompt),
                self._tokenizer.decode(list(prompt[:ENCODED]), skip_special_tokens=False)[
                    :MAX_SHOWN
                ],
            )
            for prompt in each[:MAX_TEXTS]
        ]
        self._count += 1
        steering = SteeringRequest()
        if (asked := params[0].steering) is not None:
            steering = SteeringRequest(
                num_experts_per_tok=asked.num_experts_per_tok,
                disabled=[ExpertId(layer=layer, expert=e) for layer, e in sorted(asked.disabled)],
                forced=[ExpertId(layer=layer, expert=e) for layer, e in sorted(asked.forced)],
            )
        tokens = sum(len(prompt) for prompt in prompts)
        watched = Watched(self, self._count, path, texts, len(each), tokens, steering)
        self._requests[watched.number] = watched
        self.note(watched)
        while len(self._requests) > MAX_REQUESTS:
            number, _ = self._requests.popitem(last=False)
            self._changed.pop(number, None)
        return watched

    def note(self, watched: Watched) -> None:
        """See that a change is told; not of one that has left the list."""
        if watched.number in self._requests:
            self._clock += 1
            self._changed[watched.number] = self._clock

    def since(self, clock: int) -> tuple[int, TrafficEvent | None]:
        """Return what is new since the list was last looked at, and the time of now.

        Args:
            clock: what was returned then; -1 for all.
        """
        if clock == self._clock:
            return clock, None
        numbers = [n for n in self._requests if self._changed[n] > clock]
        shown = [self._requests[number].shown for number in numbers]
        oldest = next(iter(self._requests), self._count + 1)
        return self._clock, TrafficEvent(requests=shown, oldest=oldest)

    def answer(self, number: int, text: int) -> WatchedAnswer:
        """Return one answer's tokens, its prompt's among them.

        Raises:
            NotThere: it has left the list, or was too long to be kept.
        """
        watched = self._requests.get(number)
        if watched is None or not 0 <= text < len(watched.texts):
            raise NotThere("this answer is no longer in the list", "answer_gone")
        kept = watched.texts[text]
        held = kept.ids  # the event loop may let them go meanwhile
        if held is None:
            raise NotThere(
                f"this text has {kept.prompt_tokens + kept.new_tokens} tokens; pictures are made "
                f"of up to {MAX_PICTURE}",
                "picture_too_long",
                n=kept.prompt_tokens + kept.new_tokens,
                max=MAX_PICTURE,
            )
        ids = held.tolist()
        prompt = ids[: kept.prompt_tokens]
        begin = list(self._tokenizer.begin_ids)
        typed = prompt[len(begin) :] if prompt[: len(begin)] == begin else prompt
        return WatchedAnswer(
            ids=ids,
            prompt_tokens=kept.prompt_tokens,
            prompt=self._tokenizer.decode(typed, skip_special_tokens=False),
            steering=watched.steering,
        )
