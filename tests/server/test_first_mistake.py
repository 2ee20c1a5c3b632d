"""Whatever is wrong in a request is told once, however often it is wrong."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.errors import UserError
from moescope.server.contract import ENDPOINTS
from moescope.server.messages import Messages
from moescope.server.metrics import Metrics
from moescope.server.model_thread import ModelThread
from moescope.server.ollama import Ollama
from moescope.server.openai import OpenAI
from moescope.server.requests import explained
from moescope.server.responses import Responses
from moescope.server.service import Service
from moescope.server.texts import Desk
from moescope.server.tokens import Tokens

MANY = 2000
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def kinds(model: Model) -> Iterator[list[type[BaseModel]]]:
    """What can be sent, to all APIs and to the page."""
    thread = ModelThread(model.engine, 1, 2**24)
    service = Service(model, Desk(thread, Metrics(thread)), "small")
    apis = (OpenAI, Responses, Messages, Tokens, Ollama)
    asked = [endpoint.request for api in apis for endpoint in api(service).endpoints()]
    yield [kind for kind in [*asked, *(e.request for e in ENDPOINTS)] if kind is not None]
    thread.close()


def arrays(schema: dict[str, Any], known: dict[str, Any], depth: int = 5) -> Iterator[Place]:
    """Places of a schema at which there may be a list, as keys and 0 for an item."""
    if not depth:
        return
    if "$ref" in schema:
        yield from arrays(known[schema["$ref"].rpartition("/")[2]], known, depth)
    for kind in schema.get("anyOf", []):
        yield from arrays(kind, known, depth)
    for name, field in schema.get("properties", {}).items():
        yield from ((name, *rest) for rest in arrays(field, known, depth - 1))
    if schema.get("type") == "array":
        yield ()
        yield from ((0, *rest) for rest in arrays(schema.get("items", {}), known, depth - 1))


def body(place: Place, value: Any) -> Any:
    """A body that has a value at a place, and nothing else."""
    for key in reversed(place):
        value = [value] if key == 0 else {key: value}
    return value


def test_a_list_of_mistakes_is_one(kinds: list[type[BaseModel]]) -> None:
    seen = 0
    for kind in kinds:
        schema = kind.model_json_schema()
        for place in set(arrays(schema, schema.get("$defs", {}))):
            for wrong in (1.5, {}, None, [{}], "x", {"a": 1}):
                try:
                    kind.model_validate(body(place, [wrong] * MANY))
                except UserError:
                    seen += 1
                except ValidationError as error:
                    seen += 1
                    assert error.error_count() < 40, (kind, place, wrong)
                    assert len(explained(error)) < 300
    assert seen > 100


def test_a_thousand_unknown_fields_are_one_mistake(kinds: list[type[BaseModel]]) -> None:
    unknown = {f"field{number}": number for number in range(MANY)}
    for kind in kinds:
        try:
            kind.model_validate(unknown)
        except ValidationError as error:
            assert error.error_count() < 40, kind


def test_the_page_names_an_unknown_field(client: TestClient) -> None:
    answer = client.post("/api/trace", json={"prompt": "x", "steering": {"nois": 1}})
    assert answer.status_code == 422 and "no field 'nois'" in answer.json()["message"]
