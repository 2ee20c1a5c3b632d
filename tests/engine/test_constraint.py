"""Texts drawn at random under a constraint are what it allows."""

import json
import random
import re
from typing import Any

import pytest

from moescope.api import Model
from moescope.engine.constraint import Constraint, Kind
from moescope.errors import UserError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "月"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def constraint(model: Model, kind: Kind, rule: Any, after: str = "") -> Constraint:
    ends = model.engine.end_ids
    return Constraint(model.tokenizer, model.config.vocab_size + 4, ends, kind, rule, after)


def drawn(model: Model, held_to: Constraint, seed: int) -> str:
    """A text of tokens drawn evenly from those allowed, the ends preferred."""
    chance, state, ids = random.Random(seed), held_to.start(), []
    for _ in range(400):
        mask = state.mask()
        assert mask is not None and len(mask) == model.config.vocab_size + 4
        assert not mask[model.config.vocab_size :].any()
        allowed = mask.nonzero().flatten().tolist()
        ends = [token_id for token_id in allowed if token_id in model.engine.end_ids]
        chosen = ends[0] if ends and chance.random() < 0.3 else chance.choice(allowed)
        state.accept(chosen)
        if chosen in model.engine.end_ids:
            return model.tokenizer.decode(ids)
        ids.append(chosen)
        if state.ended:
            return model.tokenizer.decode(ids)
    raise AssertionError(model.tokenizer.decode(ids))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_drawn_is_allowed(model: Model, seed: int) -> None:
    made = json.loads(drawn(model, constraint(model, "json", PERSON), seed))
    assert isinstance(made["name"], str) and 0 <= made["age"] <= 120
    assert set(made) <= {"name", "age", "tags"} and set(made.get("tags", [])) <= {"a", "月"}
    choices = ["yes", "no", "床前"]
    assert drawn(model, constraint(model, "choice", choices), seed) in choices
    number = drawn(model, constraint(model, "regex", r"[1-9][0-9]{2,4}-(月|x)"), seed)
    assert re.fullmatch(r"[1-9][0-9]{2,4}-(月|x)", number)
    gbnf = 'root ::= "a" rest\nrest ::= "b" | "c" rest'
    assert re.fullmatch("ac{0,399}b", drawn(model, constraint(model, "grammar", gbnf), seed))


def test_the_rule_holds_from_the_end_of_a_thought_on(model: Model) -> None:
    state = constraint(model, "choice", ["x"], after="</think>").start()
    end = model.tokenizer.token_id("</think>")
    assert end is not None
    for token_id in (*model.tokenizer.encode("a b"), end):
        assert state.mask() is None
        state.accept(token_id)
    mask = state.mask()
    assert mask is not None
    assert mask.nonzero().flatten().tolist() == model.tokenizer.encode("x")
    with pytest.raises(UserError, match="cannot be held to"):
        state.accept(model.tokenizer.encode("y")[0])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("json", {"type": "nothing"}),
        ("json", {"type": "object", "not": {"type": "string"}}),
        ("json", {"$ref": "#/nowhere"}),
        ("json", "{"),
        ("json", 3),
        ("regex", "("),
        ("regex", r"(?=a)b"),
        ("regex", 3),
        ("choice", []),
        ("choice", [1]),
        ("grammar", "root ::= nowhere"),
        ("grammar", ""),
        ("json", {"type": "string", "pattern": "(" * 20_000}),
    ],
)
def test_what_cannot_be_held_to_is_refused(model: Model, kind: Kind, rule: Any) -> None:
    with pytest.raises(UserError, match="cannot be held to") as refusal:
        constraint(model, kind, rule)
    assert len(str(refusal.value)) < 300
