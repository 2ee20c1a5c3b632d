"""The endpoints of the page's API in one table, and their description as an OpenAPI document."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from moescope.scope.detail import TokenDetail
from moescope.scope.history import History
from moescope.scope.reasoning import ReasoningHistory
from moescope.server import schema
from moescope.server.fields import Message


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, with what, and what comes back.

    Attributes:
        path: from the server's root.
        summary: in a few words.
        answer: the message, or the kinds of message that are streamed.
        request: the message that is sent; None for a GET.
        streams: whether the answer is a run of server-sent events.
        aside: whether it takes no model, so that it need not wait for the model's thread.
    """

    path: str
    summary: str
    answer: tuple[type[Any], ...]
    request: type[Message] | None = None
    streams: bool = False
    aside: bool = False

    @property
    def method(self) -> Literal["GET", "POST"]:
        """How to ask."""
        return "GET" if self.request is None else "POST"


ENDPOINTS = (
    *(
        Endpoint(
            f"/api/start/{language}",
            "All that the page shows first, in one answer",
            (schema.StartAnswer,),
        )
        for language in schema.LANGUAGES
    ),
    Endpoint("/api/model", "The model and what can be shown of it", (schema.ModelInfo,)),
    Endpoint(
        "/api/generate",
        "Read a text and continue it, token by token",
        (schema.TokenEvent, schema.EndEvent, schema.ErrorEvent),
        schema.GenerateRequest,
        streams=True,
    ),
    Endpoint(
        "/api/trace", "All tokens of a text at once", (schema.TraceAnswer,), schema.TextRequest
    ),
    Endpoint("/api/token", "One token in one layer", (TokenDetail,), schema.TokenRequest),
    Endpoint(
        "/api/expert", "One expert at work on a token", (schema.ExpertAnswer,), schema.ExpertRequest
    ),
    Endpoint(
        "/api/cut",
        "A text in DeepSeek's vocabulary",
        (schema.CutAnswer,),
        schema.CutRequest,
        aside=True,
    ),
    Endpoint("/api/specialization", "Which experts serve whom", (schema.SpecializationAnswer,)),
    Endpoint(
        "/api/dense", "The dense twin on the same text", (schema.DenseAnswer,), schema.DenseRequest
    ),
    Endpoint(
        "/api/unbalanced",
        "A copy trained without balancing on the same text",
        (schema.UnbalancedAnswer,),
        schema.UnbalancedRequest,
    ),
    Endpoint("/api/training", "The history of the training", (History,)),
    Endpoint(
        "/api/reasoning",
        "How a small mixture learned to reason",
        (ReasoningHistory,),
        aside=True,
    ),
    Endpoint(
        "/api/training/live",
        "Follow a training that runs now",
        (schema.TrainingEvent, schema.ErrorEvent),
        streams=True,
    ),
    Endpoint(
        "/api/traffic",
        "What is asked of the server that the page stands in",
        (schema.TrafficEvent, schema.ErrorEvent),
        streams=True,
    ),
    Endpoint(
        "/api/answer",
        "The tokens of an answer that the server gave",
        (schema.WatchedAnswer,),
        schema.AnswerRequest,
        aside=True,
    ),
)


def openapi() -> dict[str, Any]:
    """Describe the API as OpenAPI 3.1; every message is a named schema."""
    asked = {e.request for e in ENDPOINTS if e.request is not None}
    answered = {kind for e in ENDPOINTS for kind in e.answer} | {schema.ErrorEvent}
    kinds: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
        *((kind.__name__, "validation", TypeAdapter[Any](kind)) for kind in asked),
        *((kind.__name__, "serialization", TypeAdapter[Any](kind)) for kind in answered),
    ]
    kinds.sort(key=lambda kind: kind[0])
    _, definitions = TypeAdapter.json_schemas(kinds, ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "moescope", "version": "1"},
        "paths": {e.path: {e.method.lower(): _operation(e)} for e in ENDPOINTS},
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    kind = "text/event-stream" if endpoint.streams else "application/json"
    answers = [_reference(answer) for answer in endpoint.answer]
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "responses": {
            "200": {
                "description": "A run of events" if endpoint.streams else "The answer",
                "content": {
                    kind: {"schema": answers[0] if len(answers) == 1 else {"oneOf": answers}}
                },
            },
            "4XX": {
                "description": (
                    "What the reader can mend, in one sentence; status 200 where the request says "
                    "`Prefer: status=200`"
                ),
                "content": {"application/json": {"schema": _reference(schema.ErrorEvent)}},
            },
        },
    }
    if endpoint.request is not None:
        body = {"application/json": {"schema": _reference(endpoint.request)}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _reference(message: type[Any]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{message.__name__}"}
