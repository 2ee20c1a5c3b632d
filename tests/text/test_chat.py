"""Chat templates of every published style say what they say in transformers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as BackendTokenizer, models
from transformers import PreTrainedTokenizerFast

from moescope.errors import UserError
from moescope.text.chat import folder_templates
from moescope.text.tokenizer import Tokenizer

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "wetter_für",
        "description": "Weather of a <city> & its \u5468\u8fb9.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {"function": {"name": "wetter_für", "arguments": {"city": "北京"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "1 < 2 & 月?"}],
    "a conversation": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "12+34=?"},
        {"role": "assistant", "content": "<think>2+4=6</think>46"},
        {"role": "user", "content": "再来一个"},
    ],
    "a thought": [
        {"role": "user", "content": "12+34=?"},
        {"role": "assistant", "content": "46", "reasoning_content": "\n2+4=6\n"},
    ],
    "a thought by an old name": [
        {"role": "user", "content": "12+34=?"},
        {"role": "assistant", "content": "46", "thinking": "2+4=6"},
    ],
    "nothing said": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": None},
    ],
    "a tool called": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"°C": 21}'},
    ],
    "two tools called": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    ],
    "in parts": [{"role": "user", "content": [{"type": "text", "text": "moon"}]}],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "with tools": {"tools": [TOOL]},
    "with more": {
        "enable_thinking": False,
        "reasoning_effort": "high",
        "date_string": "1 Jan 2026",
    },
}


def pair(template: Any) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    backend = BackendTokenizer(models.BPE())
    backend.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **config)
    return Tokenizer(backend, config), theirs


def attempt(render: Any, *args: Any, **options: Any) -> str | None:
    """What it renders, None if it refuses."""
    try:
        return render(*args, **options)
    except Exception:
        return None


@pytest.mark.parametrize("more", VARIABLES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_templates_say_what_they_say_in_transformers(style: str, chat: str, more: str) -> None:
    ours, theirs = pair(TEMPLATES[style])
    for prompt in (False, True):
        options: dict[str, Any] = {"add_generation_prompt": prompt, **VARIABLES[more]}
        expected = attempt(theirs.apply_chat_template, CHATS[chat], tokenize=False, **options)
        if expected is None:
            with pytest.raises(UserError, match="refuses these messages"):
                ours.apply_chat_template(CHATS[chat], **options)
        else:
            assert ours.apply_chat_template(CHATS[chat], **options) == expected


def test_most_of_that_is_rendered_and_not_refused() -> None:
    for style, template in TEMPLATES.items():
        ours, _ = pair(template)
        said = [attempt(ours.apply_chat_template, chat, tools=[TOOL]) for chat in CHATS.values()]
        assert sum(text is not None for text in said) >= 6, style


def test_a_date_is_today(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(TEMPLATES["gpt_oss_like"])
    assert datetime.now().strftime("%Y-%m-") in ours.apply_chat_template(CHATS["a question"])


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_of_several_templates_the_one_for_tools_is_taken_with_tools(tools: Any) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    ours, theirs = pair(named)
    messages = CHATS["a question"]
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert ours.apply_chat_template(messages, tools=tools) == expected


def test_files_win_over_the_configuration(tmp_path: Path) -> None:
    ours, _ = pair("from the configuration")
    ours.save(tmp_path)

    def said(**options: Any) -> str:
        return Tokenizer.load(tmp_path).apply_chat_template(CHATS["a question"], **options)

    assert said() == "from the configuration"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from old JSON"}))
    assert said() == "from old JSON"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert said() == "from its own file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert (said(), said(tools=[TOOL])) == ("from its own file", "for tools")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.chat_template == Tokenizer.load(tmp_path).chat_templates
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "again").chat_template == {
        "default": "from its own file",
        "tool_use": "for tools",
    }


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template; it has rag, tool_use"):
        pair({"tool_use": "x", "rag": "y"})[0].apply_chat_template(CHATS["a question"])
    for template in ("{% if %}", "{{ messages[9].content }}{{ 1 / 0 }}", "{{ 'a'.x.y }}"):
        with pytest.raises(UserError, match="refuses these messages"):
            pair(template)[0].apply_chat_template(CHATS["a question"])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        folder_templates(tmp_path)


def test_a_chat_gets_no_second_begin(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    import moescope

    model = moescope.load("tiny")
    messages = [{"role": "user", "content": "17+25=?"}]
    ids = model.engine.encode_chat(messages)
    assert ids[0] == model.tokenizer.bos_id and ids.count(ids[0]) == 1
    assert ids == model.engine.encode(model.tokenizer.apply_chat_template(messages))
    model.tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
