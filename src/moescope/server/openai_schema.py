"""Requests of the OpenAI API, as far as this server answers them.

Fields that OpenAI does not have are those of vLLM. Other fields are passed over, unless they would
change the answer: those are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from moescope.engine.constraint import Kind
from moescope.engine.sampling import MOST_TOP_LOGPROBS, SamplingParams
from moescope.server.experts import OfExperts
from moescope.server.fields import First, Id, Lenient, List
from moescope.server.texts import refuse_too_many
from moescope.text.generation import RANGES

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOOLS = 512
MAX_BIASES = 1024
DEFAULT_TOKENS = 16
"""Of a completion; a chat goes on to its end."""
LEAST_TOP_P = 1e-6
"""What a `top_p` of 0 means: the likeliest token alone."""


_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "repeat_penalty": (1,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "tfs_z": (1,),
    "functions": ([],),
    "function_call": ("none",),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "prompt_embeds": (),
    "chat_template": (),
    "documents": ([],),
    "guided_whitespace_pattern": (),
    "add_special_tokens": (True,),
    "grammar": ("",),
    "json_schema": (),
    "mirostat": (0,),
    "typical_p": (1,),
    "length_penalty": (1,),
}
"""Fields that are not known here, each with values that ask for nothing, as null always does."""
_FORMER = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"} | {
    "guided_grammar": "grammar"
}


class StreamOptions(Lenient):
    """What a stream holds besides its text."""

    include_usage: bool | None = None


class JsonSchema(Lenient):
    """A schema with a name."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    """What a text must be; llama.cpp's clients send a schema with `json_object`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class StructuredOutputs(Lenient):
    """What a text must be, by vLLM's names."""

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: List[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class Request(OfExperts):
    """What both kinds of request share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=-1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: str | List[str] | None = None
    stop_token_ids: List[Id] | None = None
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_known(cls, fields: Any) -> Any:
        """Refuse what would change the answer and is not known here; read former names."""
        if not isinstance(fields, dict):
            return fields
        known: dict[str, Any] = {**fields}
        for name, without_effect in _WITHOUT_EFFECT.items():
            value = known.get(name)
            if value is not None and value not in without_effect:
                raise ValueError(f"this server does not know {name}; leave it out")
        former = {new: known[old] for old, new in _FORMER.items() if known.get(old) is not None}
        if former:
            known["structured_outputs"] = {**(known.get("structured_outputs") or {}), **former}
        return known

    @field_validator("stop", mode="after")
    @classmethod
    def refuse_too_many(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Refuse more texts than a token should be held to."""
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"there are {len(stop)} texts; give at most {MAX_STOPS}")
        return stop

    @field_validator("logit_bias", mode="after")
    @classmethod
    def read_biases(cls, biases: dict[str, Any] | None) -> dict[str, Any] | None:
        """Read ids and what is added to their logits."""
        if biases is None:
            return None
        if len(biases) > MAX_BIASES:
            raise ValueError(f"there are {len(biases)} tokens; give at most {MAX_BIASES}")
        for token_id, bias in biases.items():
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 10):
                raise ValueError(f"{token_id[:20]!r} is no id of a token")
            if not number or not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token_id} is not from -100 to 100")
        return biases

    @model_validator(mode="after")
    def refuse_prompts_in_streams(self) -> Self:
        """What is known of a prompt is told at once, as vLLM does."""
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not told in streams; leave stream out")
        return self

    @model_validator(mode="after")
    def refuse_two_rules(self) -> Self:
        """A text is held to one thing at most."""
        _ = self.held_to
        return self

    @property
    def choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def held_to(self) -> tuple[Kind, Any] | None:
        """What a text must be, as `Constraint` takes it.

        Raises:
            ValueError: several things at once, or one that is not known.
        """
        rules: list[tuple[Kind, Any]] = []
        form, outputs = self.response_format, self.structured_outputs
        if form is not None and form.type == "json_object":
            rules.append(("json", True if form.schema_ is None else form.schema_))
        elif form is not None and form.type == "json_schema":
            schema = form.json_schema and form.json_schema.schema_
            if schema is None or form.json_schema is None:
                raise ValueError("response_format has no json_schema.schema; give one")
            rules.append(("json", schema))
        elif form is not None and form.type == "structural_tag":
            raise ValueError("this server does not know structural_tag; leave it out")
        if outputs is not None:
            if outputs.structural_tag is not None:
                raise ValueError("this server does not know structural_tag; leave it out")
            told: dict[Kind, Any] = {
                "json": outputs.json_ if outputs.json_ is not None else outputs.json_object or None,
                "regex": outputs.regex,
                "choice": outputs.choice,
                "grammar": outputs.grammar,
            }
            rules.extend((kind, rule) for kind, rule in told.items() if rule is not None)
        if len(rules) > 1:
            raise ValueError("a text can be held to one thing at a time; name one")
        return rules[0] if rules else None

    def sampling(
        self,
        max_tokens: int,
        top_logprobs: int,
        defaults: Mapping[str, float],
        **more: Any,
    ) -> list[SamplingParams]:
        """How each choice is drawn; with a seed, all choices differ and are drawn so again.

        Args:
            max_tokens: tokens of each choice at most.
            top_logprobs: likeliest tokens that are told with each.
            defaults: what the model's files say, where the request says nothing; OpenAI's
                temperature is 1 where neither does.
            more: other fields of SamplingParams.
        """
        asked = {name: getattr(self, name) for name in RANGES}
        drawn = {"temperature": 1.0, **defaults} | {
            name: value for name, value in asked.items() if value is not None
        }
        if drawn.get("top_k", 0) < 1:  # -1 and 0 ask for all tokens
            drawn.pop("top_k", None)
        if drawn.get("top_p") == 0:
            drawn["top_p"] = LEAST_TOP_P
        fields: dict[str, Any] = drawn | more
        if self.logit_bias:
            fields["logit_bias"] = {int(i): float(bias) for i, bias in self.logit_bias.items()}
        if self.min_tokens:
            fields["min_tokens"] = self.min_tokens
        fields.setdefault("prompt_logprobs", self.prompt_logprobs)
        fields |= {"routed_experts": self.tells_experts, "steering": self.steering}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed == -1 else self.seed
        return [
            SamplingParams(
                **fields,
                max_tokens=max_tokens,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                seed=None if seed is None else (seed + choice) % 2**63,
                stop=tuple(text for text in stop if text),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                top_logprobs=top_logprobs,
            )
            for choice in range(self.choices)
        ]


class CompletionRequest(Request):
    """Continue texts, or ids."""

    prompt: str | List[str] | List[Id] | List[List[Id]]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def refuse_too_many_texts(self) -> Self:
        """Before any of them is read."""
        several = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        refuse_too_many(len(self.prompt) if several else 1, self.choices)
        return self

    @property
    def known_of_prompts(self) -> int | None:
        """Likeliest tokens that are told with each of a prompt; None if nothing is."""
        echoed = self.logprobs if self.echo else None
        asked = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, as texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class Part(Lenient):
    """A piece of a message; only text is read."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def refuse_what_is_no_text(self) -> "Part":
        """Refuse pictures and sounds."""
        if self.type not in ("text", "input_text", "output_text", "refusal"):
            raise ValueError(f"this model reads text alone, no part of type {self.type[:40]!r}")
        return self

    @property
    def told(self) -> str:
        """Its text."""
        return self.text or self.refusal or ""


class Function(Lenient):
    """A function that was called."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Lenient):
    """A call in a history."""

    id: str | None = None
    type: str = "function"
    function: Function


class ChatMessage(Lenient):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | List[Part] | None = None
    name: str | None = None
    tool_calls: List[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def want_content(self) -> "ChatMessage":
        """Only who called tools may have said nothing."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        parts: Sequence[Part] = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(p.told for p in parts)
        told: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            told["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                told[name] = getattr(self, name)
        thought = self.reasoning_content or self.reasoning
        return told | ({"reasoning_content": thought} if thought else {})


class FunctionTool(Lenient):
    """A function that may be called."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """A tool that may be called."""

    type: Literal["function"] = "function"
    function: FunctionTool

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates want it."""
        told = self.function.model_dump(exclude_none=True, exclude={"strict"})
        empty = {"type": "object", "properties": {}}
        return {"type": "function", "function": {"parameters": empty, **told}}


class Named(Lenient):
    """A name."""

    name: str


class NamedTool(Lenient):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: Named


class ChatRequest(Request):
    """Answer a conversation."""

    messages: Annotated[list[ChatMessage], First(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=-1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    tools: Annotated[list[Tool], First(), Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def want_tools(self) -> "ChatRequest":
        """A tool that must be called must be there."""
        names = [tool.function.name for tool in self.tools or []]
        chosen = self.tool_choice
        if chosen == "required" and not names:
            raise ValueError("tool_choice is required but there are no tools; give some")
        if isinstance(chosen, NamedTool) and chosen.function.name not in names:
            raise ValueError(f"tool_choice names {chosen.function.name[:64]!r}, no tool given")
        if self.most == 0:
            raise ValueError("max_tokens is 0; ask for one token at least")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs are only told with logprobs; set logprobs to true")
        return self

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most; None for no limit."""
        latest = self.max_completion_tokens
        asked = self.max_tokens if latest is None else latest
        return None if asked == -1 else asked
