"""Answers in every published form of calling tools, whole and in bits of any size."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moescope.text.answers import reader
from moescope.text.answers.grammar import calls_grammar
from moescope.text.answers.pieces import Arguments, Call, Content, Piece, Thought
from moescope.text.answers.reader import AnswerReader, Form, form_of

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "write": {"type": "object", "properties": {"path": {"type": "string"}, "lines": {}}},
    "now": {"type": "object", "properties": {}},
}
BEIJING = {"city": "北京", "days": 3}
FILE = {"path": 'a"b\\c.txt', "lines": ["x < y", {"z": None}]}
Told = tuple[str, str, list[tuple[str, Any]]]


def j(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def deepseek_v3(name: str, arguments: Any) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{j(arguments)}\n```"
        "<｜tool▁call▁end｜>"
    )


def tagged(name: str, arguments: dict[str, Any], form: str) -> str:
    told = ""
    for key, value in arguments.items():
        text = value if isinstance(value, str) else j(value)
        kind = "true" if isinstance(value, str) else "false"
        told += {
            "glm": f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n",
            "coder": f"<parameter={key}>\n{text}\n</parameter>\n",
            "dsml": f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>\n',
        }[form]
    return {
        "glm": f"<tool_call>{name}\n{told}</tool_call>",
        "coder": f"<tool_call>\n<function={name}>\n{told}</function>\n</tool_call>",
        "dsml": f'<｜DSML｜invoke name="{name}">\n{told}</｜DSML｜invoke>\n',
    }[form]


TWO = [("get_weather", BEIJING), ("write", FILE)]
WITHOUT = [("now", {}), ("get_weather", BEIJING)]
SAID = "Let me see.\n\n"


def calls_of(form: str, calls: list[tuple[str, Any]]) -> str:
    if form == "DeepSeek V3":
        inside = "\n".join(deepseek_v3(*call) for call in calls)
        return f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>"
    if form == "DeepSeek V3.1":
        inside = "".join(
            f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{j(a)}<｜tool▁call▁end｜>" for n, a in calls
        )
        return f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>"
    if form == "DeepSeek V3.2":
        inside = "".join(tagged(*call, "dsml") for call in calls)
        return f"<｜DSML｜function_calls>\n{inside}</｜DSML｜function_calls>"
    if form in ("GLM", "Qwen3-Coder"):
        kind = "glm" if form == "GLM" else "coder"
        return "\n".join(tagged(*call, kind) for call in calls)
    if form == "Hermes":
        return "\n".join(
            f'<tool_call>\n{{"name": "{n}", "arguments": {j(a)}}}\n</tool_call>' for n, a in calls
        )
    if form == "Mistral":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{j(a)}" for n, a in calls)
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{j(a)}<|call|>"
        for n, a in calls
    )


FORMS = {
    form.name: form
    for form in vars(reader).values()
    if isinstance(form, Form) and form is not reader.PLAIN
}


def told(pieces: list[Piece]) -> Told:
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Call):
            calls.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return thought, content, [(name, json.loads(arguments)) for name, arguments in calls]


def read(form: Form, text: str, sizes: list[int], prompt: str = "", tools: Any = TOOLS) -> Told:
    answer, pieces, at = AnswerReader(form, prompt, tools), [], 0
    for size in cycle(sizes):
        pieces += answer.feed(text[at : at + size], final=at + size >= len(text))
        at += size
        if at >= len(text):
            return told(pieces)
    raise AssertionError


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@pytest.mark.parametrize("calls", [TWO, WITHOUT], ids=["two", "without arguments"])
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25)
@given(sizes=SIZES)
def test_calls_are_read_in_bits_of_any_size(
    name: str, calls: list[tuple[str, Any]], sizes: list[int]
) -> None:
    form = FORMS[name]
    if form is reader.HARMONY:
        text = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{calls_of(name, calls)}"
        assert read(form, text, sizes) == ("Hm.", "", calls)
        return
    assert form.thought is not None
    begin, end = form.thought
    text = f"{begin}Hm.{end}{SAID}{calls_of(name, calls)}"
    assert read(form, text, sizes) == ("Hm.", SAID.rstrip(), calls)
    begun = f"Hm.{end}{calls_of(name, calls)}"
    assert read(form, begun, sizes, prompt=f"{begin}\n") == ("Hm.", "", calls)


RECORDED: dict[str, tuple[Form, str, Told]] = {
    "harmony, recipient before the channel": (
        reader.HARMONY,
        "<|channel|>commentary<|message|>First,<|end|><|start|>assistant to=functions.now"
        '<|channel|>commentary json<|message|>{"a": "}"}<|call|>',
        ("", "First,", [("now", {"a": "}"})]),
    ),
    "harmony, an answer": (
        reader.HARMONY,
        "<|channel|>analysis<|message|>1+1<|end|><|start|>assistant<|channel|>final<|message|>2",
        ("1+1", "2", []),
    ),
    "Mistral, one list": (
        reader.MISTRAL,
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"arguments": {"city": "a]b"}, '
        '"name": "get_weather", "id": "abcdefghi"}]',
        ("", "", [("now", {}), ("get_weather", {"city": "a]b"})]),
    ),
    "Mistral, with an id": (
        reader.MISTRAL,
        '[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": 1}',
        ("", "", [("now", {"a": 1})]),
    ),
    "Mistral, without marks between": (
        reader.MISTRAL,
        '[THINK]x[/THINK][TOOL_CALLS]now{"a": {"b": 1}}',
        ("x", "", [("now", {"a": {"b": 1}})]),
    ),
    "Hermes, arguments in a string": (
        reader.HERMES,
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", "", [("now", {"a": 1})]),
    ),
    "Hermes, parameters": (
        reader.HERMES,
        '<tool_call>\n{"id": [1, {"x": "}"}], "name": "now", "parameters": {"a": 1.5e3}}\n'
        "</tool_call>",
        ("", "", [("now", {"a": 1500.0})]),
    ),
    "Hermes, no call at all": (
        reader.HERMES,
        "<tool_call>later</tool_call> yes",
        ("", "later yes", []),
    ),
    "Hermes, less than a mark": (reader.HERMES, "1 <too", ("", "1 <too", [])),
    "GLM, on one line": (
        reader.GLM,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>1</arg_value></tool_call>",
        ("", "", [("get_weather", {"city": "1"})]),
    ),
    "GLM, a tool nobody gave": (
        reader.GLM,
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
        "<arg_key>b</arg_key>\n<arg_value>one</arg_value>\n</tool_call>",
        ("", "", [("f", {"a": 1, "b": "one"})]),
    ),
    "Qwen3-Coder, several lines": (
        reader.QWEN_CODER,
        "<tool_call>\n<function=write>\n<parameter=path>\n\na\n\nb\n\n</parameter>\n</function>\n"
        "</tool_call>",
        ("", "", [("write", {"path": "\na\n\nb\n"})]),
    ),
}


@pytest.mark.parametrize("case", RECORDED)
@settings(max_examples=25)
@given(sizes=SIZES)
def test_what_models_write(case: str, sizes: list[int]) -> None:
    form, text, expected = RECORDED[case]
    assert read(form, text, sizes) == expected


@settings(max_examples=25)
@given(text=st.text(alphabet='<>tool_c/{}[]":,nameARGS｜▁DSML|think \n\\'), sizes=SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_nothing_breaks_a_reader(name: str, text: str, sizes: list[int]) -> None:
    form = FORMS[name]
    for mark in form.marks[:2]:
        answer, at = AnswerReader(form, "", TOOLS), 0
        whole = mark + text + mark
        for size in sizes:
            list(answer.feed(whole[at : at + size], final=False))
            at += size
        list(answer.feed(whole[at:], final=True))
        assert next(iter(answer.feed("", final=True)), None) is None


def test_without_tools_all_is_content_and_thoughts_are_thoughts() -> None:
    text = "<think>a</think>b<tool_call>c</tool_call> "
    expected = ("a", "b<tool_call>c</tool_call> ", [])
    assert read(reader.HERMES, text, [1] * 40, tools=None) == expected
    assert read(reader.PLAIN, " <thin", [3]) == ("", " <thin", [])


def test_a_template_tells_its_form() -> None:
    teaches = {
        "{{ '<|start|>assistant<|channel|>final<|message|>' }}": reader.HARMONY,
        "<｜DSML｜function_calls>": reader.DEEPSEEK_V32,
        "<｜tool▁calls▁begin｜>…```json": reader.DEEPSEEK_V3,
        "<｜tool▁calls▁begin｜>": reader.DEEPSEEK_V31,
        "<tool_call>{name}\n<arg_key>": reader.GLM,
        "<tool_call>\n<function=": reader.QWEN_CODER,
        '<tool_call>\n{"name"': reader.HERMES,
        "[TOOL_CALLS]": reader.MISTRAL,
        "{{ messages }}": reader.PLAIN,
    }
    assert {text: form_of(text) for text in teaches} == teaches
    templates = Path(__file__).parent / "templates"
    assert form_of((templates / "gpt_oss_like.jinja").read_text("utf-8")) is reader.HARMONY


TEMPLATES = {"Mistral": "[TOOL_CALLS][ARGS]"}


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_calls_that_must_be_made_are_read_again(name: str, one: bool, model: Any) -> None:
    """Drawn at random under the grammar, in a vocabulary where a mark is one token."""
    from random import Random

    from tokenizers import AddedToken

    from moescope.engine.constraint import Constraint
    from moescope.text.tokenizer import Tokenizer

    backend = type(model.tokenizer._backend).from_str(model.tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken(mark) for mark in FORMS[name].marks[:3]])
    tokenizer = Tokenizer(backend, model.tokenizer._config)
    ends = [tokenizer.eos_id]

    def special(text: str) -> int | None:
        token_id = tokenizer.token_id(text)
        return token_id if token_id in tokenizer.special_ids else None

    strict = {
        name: {**schema, "required": ["city"], "additionalProperties": False}
        if name == "get_weather"
        else schema
        for name, schema in TOOLS.items()
        if name != "write"
    }

    def drawn(grammar: str, liked: bytes, chance: Random, share: float) -> list[int]:
        """Tokens of which so many begin as is liked, where they may."""
        state = Constraint(tokenizer, tokenizer.vocab_size, ends, "lark", grammar).start()
        ids: list[int] = []
        while not state.ended and len(ids) < 2000:
            mask = state.mask()
            assert mask is not None
            choices = mask.nonzero().flatten().tolist()
            likely = [i for i in choices if i in ends or tokenizer.token_bytes(i)[:1] in liked]
            ids.append(chance.choice(likely if likely and chance.random() < share else choices))
            state.accept(ids[-1])
        return ids

    rated = {"rate": {"type": "object", "properties": {"stars": {"type": "integer", "maximum": 5}}}}
    rated["rate"] |= {"required": ["stars"], "additionalProperties": False}
    for template in {TEMPLATES.get(name, ""), ""}:
        grammar = calls_grammar(FORMS[name], template, rated, special, one=True)
        ids = drawn(grammar, b" \t\r\n", Random(0), 1.0)
        assert len(ids) < 400, "blanks without end"
        grammar = calls_grammar(FORMS[name], template, strict, special, one=one)
        for seed in range(3):
            ids = drawn(grammar, b'"}<\n', Random(seed), 0.7)
            text = tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=False)
            thought, content, calls = read(FORMS[name], text, [5], tools=strict)
            assert (thought, content) == ("", "") and calls
            assert len(calls) == 1 or not one
            for called, arguments in calls:
                assert called in strict and (called != "get_weather" or "city" in arguments)
