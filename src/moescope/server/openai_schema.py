"""Requests of the OpenAI API, as far as this server answers them.

Fields that OpenAI does not have are those of vLLM: `top_k`, `min_p`, `repetition_penalty` and
`ignore_eos`. Other fields are passed over, unless they would change the answer: those are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moescope.engine.sampling import MOST_TOP_LOGPROBS, SamplingParams
from moescope.text.generation import RANGES

MOST_CHOICES = 16
MOST_STOPS = 16
DEFAULT_TOKENS = 16
"""Of a completion; a chat goes on to its end."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "guided_json": (),
}
"""Fields that are not known here, each with values that ask for nothing, as null always does."""


class Request(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_known(cls, fields: Any) -> Any:
        """Refuse what would change the answer and is not known here."""
        if isinstance(fields, Mapping):
            for name, without_effect in _WITHOUT_EFFECT.items():
                value = fields.get(name)
                if value is not None and value not in without_effect:
                    raise ValueError(f"this server does not know {name}; leave it out")
        return fields

    @field_validator("stop")
    @classmethod
    def refuse_too_many(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Refuse more texts than a token should be held to."""
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            raise ValueError(f"there are {len(stop)} texts; give at most {MOST_STOPS}")
        return stop

    @property
    def choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self, max_tokens: int, top_logprobs: int, defaults: Mapping[str, float]
    ) -> list[SamplingParams]:
        """How each choice is drawn; with a seed, all choices differ and are drawn so again.

        Args:
            max_tokens: tokens of each choice at most.
            top_logprobs: likeliest tokens that are told with each.
            defaults: what the model's files say, where the request says nothing; OpenAI's
                temperature is 1 where neither does.
        """
        asked = {name: getattr(self, name) for name in RANGES}
        drawn = {"temperature": 1.0, **defaults} | {
            name: value for name, value in asked.items() if value is not None
        }
        if drawn.get("top_k", 0) < 1:  # -1 and 0 ask for all tokens
            drawn.pop("top_k", None)
        fields: dict[str, Any] = drawn
        return [
            SamplingParams(
                **fields,
                max_tokens=max_tokens,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                seed=None if self.seed is None else (self.seed + choice) % 2**63,
                stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
                ignore_eos=bool(self.ignore_eos),
                top_logprobs=top_logprobs,
            )
            for choice in range(self.choices)
        ]


class StreamOptions(BaseModel):
    """What a stream holds besides its text."""

    include_usage: bool | None = None


class CompletionRequest(Request):
    """Continue texts, or ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, as texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        if ids:
            return [ids]
        return [part for part in self.prompt if not isinstance(part, int)]


class Part(BaseModel):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """The message as chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        parts: Sequence[Part] = [] if isinstance(self.content, str) else self.content
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in parts)
        return {"role": role, "content": text}


class ChatRequest(Request):
    """Answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
