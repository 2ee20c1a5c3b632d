"""What only a mixture can be asked, whatever API asks, and how answers tell of it.

Fields have vLLM's names where it has any. What is told of tokens is `[tokens, layers, slots]`:
layers are those with routers, an empty slot is -1.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from moescope.engine.sequence import RoutedTokens, Token
from moescope.model.steering import Steering
from moescope.server.fields import First, Id, Lenient

Json = dict[str, Any]

MAX_EXPERTS = 16_384
"""That a request may name: more than any published model has."""
WITHOUT_PLACE = (
    *("prompt_logprobs", "logprobs", "top_logprobs", "logit_bias", "response_format"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("grammar", "json_schema", "min_tokens", "stop_token_ids", "ignore_eos"),
)
"""Fields that OpenAI's completions and chats have alone, at least here."""
Experts = Annotated[list[tuple[Id, Id]], First(), Field(max_length=MAX_EXPERTS)]
"""A layer and an expert in it each, both from 0."""


class OfExperts(Lenient):
    """What a request says of experts: whom to tell of, and what its routers do otherwise."""

    return_routed_experts: bool | None = None
    moe_trace: bool | None = None
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    disable_experts: Experts | None = None
    force_experts: Experts | None = None

    @property
    def of_experts(self) -> Json:
        """Those of these fields that say something, for a request of another API."""
        told = {name: getattr(self, name) for name in OfExperts.model_fields}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def tells_experts(self) -> bool:
        """Whether it is told which experts served each token."""
        return bool(self.return_routed_experts or self.moe_trace)

    @property
    def steering(self) -> Steering | None:
        """What the routers do otherwise for its texts.

        Raises:
            UserError: it contradicts itself.
        """
        made = Steering(
            self.num_experts_per_tok,
            disabled=self.disable_experts or (),
            forced=self.force_experts or (),
        )
        return None if made.changes_nothing else made


class InOtherApis(OfExperts):
    """The same in an API that has no place for what completions and chats have besides."""

    @model_validator(mode="before")
    @classmethod
    def refuse_what_has_no_place(cls, fields: Any) -> Any:
        """Refuse what would be neither told nor held to."""
        asked: Json = fields if isinstance(fields, dict) else {}
        for name in WITHOUT_PLACE:
            if asked.get(name) not in (None, False, 0):
                raise ValueError(
                    f"this API has no place for {name}; ask /v1/completions or /v1/chat/completions"
                )
        return fields


def all_experts_told(asked: OfExperts, tokens: Sequence[Token]) -> Json:
    """Tell of a whole answer of one text, prompt and all."""
    return prompt_experts(asked, tokens) | experts_told(asked, tokens)


def experts_told(asked: OfExperts, tokens: Sequence[Token]) -> Json:
    """Tell of the tokens that were read for tokens of one text, as its choice holds it.

    `routed_experts` are of made tokens, but the last, which is read no more; `moe_trace` is of all.
    """
    parts = [token.routed for token in tokens if token.routed is not None]
    told: Json = {}
    if parts and asked.return_routed_experts:
        made = [part for part in parts if part.start > 0]
        told["routed_experts"] = RoutedTokens.join(made).ids.tolist() if made else []
    if parts and asked.moe_trace:
        told["moe_trace"] = _trace(RoutedTokens.join(parts))
    return told


def prompt_experts(asked: OfExperts, tokens: Sequence[Token]) -> Json:
    """Tell of a prompt, if it is asked for and the first token of a text is among `tokens`."""
    parts = [token.routed for token in tokens if token.routed and token.routed.start == 0]
    if not parts or not asked.return_routed_experts:
        return {}
    return {"prompt_routed_experts": parts[0].ids.tolist()}


def _trace(routed: RoutedTokens) -> Json:
    return {
        "start": routed.start,
        "layers": list(routed.layers),
        "experts": routed.ids.tolist(),
        "weights": routed.weights.tolist(),
        "scores": routed.scores.tolist(),
    }
