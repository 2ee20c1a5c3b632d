"""Bodies of requests, drawn from the OpenAPI document: right ones, wrong ones, and bytes."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]

MAX_TOKENS = 2
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict")
KINDS = (
    *("message", "reasoning", "function", "function_call", "function_call_output"),
    *("text", "input_text", "output_text", "image_url", "image", "refusal"),
    *("tool_use", "tool_result", "thinking", "redacted_thinking", "tool", "any", "auto"),
    *("json_schema", "json_object", "json", "enabled", "disabled", "required", "none"),
)
"""Values of `type` and its like, in all APIs."""
TEXT_KINDS = ("text", "input_text", "output_text")
NAMES = (
    *("type", "role", "content", "text", "name", "arguments", "input", "output", "id", "call_id"),
    *("function", "parameters", "description", "schema", "format", "tool_use_id", "thinking"),
    *("effort", "title", "enable_thinking", "tools", "messages", "bos_token"),
)
"""Fields inside of what the document calls an object and no more."""
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")

words = st.sampled_from(("", "a", "the moon", "床前明月光", "user", "assistant", "tool", "small"))
texts = words | st.sampled_from(KINDS) | st.text(max_size=12)
integers = st.integers(-3, 5) | st.integers(-(2**70), 2**70)
numbers = st.floats(0, 2) | st.floats() | st.sampled_from((1e-38, 1e308, -0.0))
scalars = st.none() | st.booleans() | integers | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def _objects(
    draw: st.DrawFn, fields: Mapping[str, st.SearchStrategy[Any]], wanted: Collection[str]
) -> dict[str, Any]:
    """Draw an object with what is required, and a few of the other fields."""
    others = sorted(fields.keys() - set(wanted))
    few = draw(st.lists(st.sampled_from(others), max_size=4, unique=True)) if others else []
    return {name: draw(fields[name]) for name in [*sorted(wanted), *few]}


parts = _objects(
    {"type": st.sampled_from(KINDS), **{n: texts | values for n in NAMES if n != "type"}}, {"type"}
)
"""What content, histories and tools are made of, where the document says no more."""

said = texts | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(TEXT_KINDS), "text": texts}) | parts, max_size=2
)
"""Content of a message."""
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": said})
    | parts,
    max_size=3,
)

patterns = st.sampled_from(
    ("a*", "[a-z]{2,900}", "(a|b)+$", "(?=a)b", "(", "\\d{4}-\\d\\d", "^.*$")
)
grammars = st.sampled_from(
    ('root ::= "a" root | "b"', 'start: /a+/ "b"', "root ::= root", "start: nowhere", "%%", "")
)
json_schemas = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(TYPES)},
        optional={
            "enum": st.lists(scalars, max_size=3),
            "pattern": patterns,
            "minimum": numbers,
            "maximum": integers,
            "multipleOf": numbers,
            "minLength": integers,
            "maxLength": st.integers(-1, 5000),
            "format": st.sampled_from(("date", "email", "uuid", "nothing")),
            "$ref": st.sampled_from(("#", "#/$defs/a", "nowhere", "http://127.0.0.1:1/")),
            "const": values,
        },
    )
    | st.booleans(),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(("object", "array"))},
        optional={
            "properties": st.dictionaries(words, inner, max_size=3),
            "required": st.lists(words, max_size=2),
            "additionalProperties": inner,
            "items": inner,
            "anyOf": st.lists(inner, max_size=3),
            "allOf": st.lists(inner, max_size=2),
            "$defs": st.fixed_dictionaries({"a": inner}),
            "minItems": integers,
            "maxItems": st.integers(-1, 50),
        },
    ),
    max_leaves=5,
)


def of(schema: Schema, document: Schema) -> st.SearchStrategy[Any]:
    """What a schema of the document allows, and a little more: ranges are overstepped."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: of(document["components"]["schemas"][name], document))
    if "anyOf" in schema:
        return st.one_of([of(one, document) for one in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        least = schema.get("minItems", 0)
        return st.lists(of(schema.get("items", {}), document), min_size=least, max_size=3)
    if kind == "object" and "properties" in schema:
        fields = {name: of(one, document) for name, one in schema["properties"].items()}
        for name, strategy in NAMED.items():
            if name in fields:
                fields[name] = strategy
        wanted = schema.get("required", [])
        return _objects(fields, {*wanted, *(fields.keys() & {"role", "content", "messages"})})
    if kind in ("integer", "number"):
        least, most = schema.get("minimum", -3), schema.get("maximum", 300)
        if kind == "number":
            return st.floats(least, most) | st.floats(0, 2)
        return st.integers(int(least), int(most)) | st.integers(max(0, int(least)), 3)
    simple = {"string": texts, "boolean": st.booleans(), "null": st.none()}
    simple |= {"object": parts | json_schemas}
    return simple[kind] if kind in simple else values | parts


NAMED: Mapping[str, st.SearchStrategy[Any]] = {
    "model": st.just("small"),
    "schema": json_schemas,
    "json": json_schemas,
    "parameters": json_schemas,
    "input_schema": json_schemas,
    "format": json_schemas | st.just("json"),
    "regex": patterns,
    "grammar": grammars,
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "role": st.sampled_from(("user", "user", "assistant", "system", "tool")),
    "content": said,
    "input": texts | turns,
    "tool_choice": st.sampled_from(("none", "auto", "required"))
    | st.fixed_dictionaries({"type": st.sampled_from(KINDS)}, optional={"name": words}),
    "prompt": texts | st.lists(st.integers(0, 299), min_size=1, max_size=4),
    **dict.fromkeys(("system", "instructions"), texts),
    **dict.fromkeys(
        ("previous_response_id", "conversation", "background", "structural_tag", "prompt_logprobs"),
        st.none() | values,
    ),
    **dict.fromkeys(("images", "suffix", "template"), st.none() | values),
}
"""Fields that a guess at their type would never fill with what is looked at."""


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[Any]) -> Any:
    """Draw a body; in two of five something is replaced, renamed or left out."""
    body = draw(bodies)
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        holder, place = body, None
        while isinstance(holder, dict | list) and holder:
            if place is not None and not draw(st.booleans()):
                break
            parent = holder
            keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
            place = draw(st.sampled_from(keys))
            holder = parent[place]
        if place is None:
            continue
        how = draw(st.sampled_from(("replace", "replace", "drop", "rename")))
        if how == "rename" and isinstance(parent, dict):
            parent[draw(texts)] = parent.pop(place)
        elif how == "drop":
            del parent[place]
        else:
            parent[place] = draw(values | parts)
    return body


def short(body: Any) -> Any:
    """The same, asking for few tokens; what is no number stays."""
    if not isinstance(body, dict):
        return body
    options = body.get("options")
    if isinstance(options, dict):
        body = body | {"options": short(options | {"num_predict": options.get("num_predict", 2)})}
    elif "options" in body and options is None:
        del body["options"]
    held = {name: body.get(name) for name in LIMITS if name in body}
    if body.keys() & {"prompt", "messages", "input"}:
        held = {"max_tokens": None, "max_output_tokens": None, "options": None} | held
    for name, limit in held.items():
        if name == "options":
            body.setdefault("options", {"num_predict": MAX_TOKENS})
        elif limit is None or not _is_few(limit):
            body[name] = MAX_TOKENS
    return body


def _is_few(limit: Any) -> bool:
    try:
        number = float(limit)
    except (TypeError, ValueError, OverflowError):
        return not isinstance(limit, int)
    return math.isnan(number) or 0 <= number <= MAX_TOKENS


@st.composite
def encoded(draw: st.DrawFn, bodies: st.SearchStrategy[Any]) -> bytes:
    """Draw a body's bytes: as they should be, or hurt."""
    body = short(draw(bodies))
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    sent = text.encode(errors="surrogatepass")
    how = draw(
        st.sampled_from(("whole",) * 10 + ("cut", "flip", "insert", "deep", "long", "large"))
    )
    at = draw(st.integers(0, len(sent)))
    if how == "cut":
        return sent[:at]
    if how == "flip":
        return sent[:at] + draw(st.binary(min_size=1, max_size=2)) + sent[at + 1 :]
    if how == "insert":
        return sent[:at] + draw(st.binary(max_size=20)) + sent[at:]
    if how == "deep":
        depth = draw(st.integers(10, 3000))
        opened, closed = draw(st.sampled_from(((b"[", b"]"), (b'{"type":', b"}"))))
        nested = opened * depth + b"1" + closed * depth
        name = draw(st.sampled_from(("tools", "input", "messages", "prompt", "format", "schema")))
        return sent.rstrip(b"}") + b',"' + name.encode() + b'":' + nested + b"}"
    if how == "large":
        number = draw(st.sampled_from((b"1e999", b"-1e400", b"NaN", b"9" * 400, b"9" * 5000)))
        return sent.replace(b'"the moon"', number) + b" "
    if how == "long":
        word = draw(st.sampled_from(("x", "床", "<tool_call>", "\\u0000"))).encode()
        return sent.replace(b"the moon", word * draw(st.integers(100, 3000)))
    return sent
