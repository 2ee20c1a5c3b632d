"""Ask a server by the real clients: `python ask.py CLIENT URL`. Says what is wrong, or nothing.

It runs in an environment of its own, `.venv-clients`: some clients pin what moescope has newer.
"""

import asyncio
import json
import sys
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "Is it warm in Rome?"
MODEL, KEY = "small", "sesame"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


class City(StrEnum):
    """Where."""

    rome = "Rome"
    beijing = "北京"


class Weather(BaseModel, extra="forbid"):
    """The weather."""

    city: City
    mood: Literal["warm", "cold"]


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "北京"]}, "mood": {"enum": ["warm", "cold"]}},
    "required": ["city", "mood"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA},
}


def use_openai(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": [TOOL]}
    with client.chat.completions.stream(
        **asked, tool_choice="required", parallel_tool_calls=False, max_tokens=800
    ) as stream:
        calls = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.get_final_completion().choices[0].message
    assert len(calls) > 1 and message.tool_calls
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments).keys() == {"city", "mood"}
    history = [
        *MESSAGES,
        message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    told = client.chat.completions.create(
        model=MODEL, messages=history, tools=[TOOL], tool_choice="none", max_tokens=4
    )
    assert told.choices[0].message.tool_calls is None
    flat: Any = {"type": "function", **TOOL["function"], "strict": True}
    made = client.responses.create(
        model=MODEL, input=QUESTION, tools=[flat], tool_choice="required", max_output_tokens=800
    )
    assert made.output[0].type == "function_call"
    with client.responses.stream(
        model=MODEL, input=QUESTION, text_format=Weather, max_output_tokens=400
    ) as events:
        kinds = [event.type for event in events]
        assert isinstance(events.get_final_response().output_parsed, Weather)
    assert "response.output_text.delta" in kinds


def use_anthropic(url: str) -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)
    tool: Any = {"name": "weather", "description": "Tells it", "input_schema": SCHEMA}
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": [tool]}
    asked |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    made = client.messages.create(**asked, max_tokens=800)
    assert made.stop_reason == "tool_use" and made.content[-1].type == "tool_use"
    assert made.content[-1].input.keys() == {"city", "mood"}
    with client.messages.stream(**asked, max_tokens=800) as stream:
        assert len([event.type for event in stream]) > 4
        final = stream.get_final_message()
    assert final.content[-1].type == "tool_use" and final.content[-1].input["city"]
    assert client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 3
    result = {"type": "tool_result", "tool_use_id": final.content[-1].id, "content": "21"}
    history: list[Any] = [*MESSAGES, {"role": "assistant", "content": final.content}]
    history.append({"role": "user", "content": [result]})
    again = client.messages.create(model=MODEL, messages=history, max_tokens=3)
    assert again.usage.output_tokens <= 3
    try:
        client.messages.create(model=MODEL, messages=MESSAGES * 4000, max_tokens=3)
    except anthropic.BadRequestError as error:
        assert "shorten it" in str(error)
    else:
        raise AssertionError("a prompt beyond the context was read")


def use_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model=MODEL, max_tokens=800, max_retries=0)
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(Weather, method=method)
        assert isinstance(structured.invoke(QUESTION), Weather)
    bound = chat.bind_tools([TOOL], tool_choice="weather")
    assert bound.invoke(QUESTION).tool_calls[0]["name"] == "weather"
    whole: Any = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"].keys() == {"city", "mood"}


def use_litellm(url: str) -> None:
    import litellm

    asked: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY}
    asked |= {"messages": MESSAGES, "max_tokens": 800, "tools": [TOOL], "tool_choice": "required"}
    made = litellm.completion(**asked)
    assert made.choices[0].message.tool_calls[0].function.name == "weather"
    chunks = list(litellm.completion(**asked, stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert json.loads(rebuilt.choices[0].message.tool_calls[0].function.arguments)["mood"]
    del asked["tools"], asked["tool_choice"]
    told = litellm.completion(**asked, response_format=Weather).choices[0].message.content
    assert isinstance(Weather.model_validate_json(told), Weather)


def use_pydantic_ai(url: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=KEY))
    for output in (ToolOutput(Weather), NativeOutput(Weather)):
        agent = Agent(model, output_type=output, model_settings={"max_tokens": 800})
        assert isinstance(agent.run_sync(QUESTION).output, Weather)

    async def streamed(agent: Agent[None, Weather]) -> Weather:
        async with agent.run_stream(QUESTION) as told:
            return await told.get_output()

    assert isinstance(asyncio.run(streamed(agent)), Weather)


def use_instructor(url: str) -> None:
    import instructor
    import openai
    from instructor.dsl.partial import PartialLiteralMixin

    class Mood(BaseModel, PartialLiteralMixin):
        mood: Literal["warm", "cold"]

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=MODEL, messages=MESSAGES, response_model=Weather, max_tokens=800, max_retries=0
        )
        assert isinstance(made, Weather)
        *_, last = instructor.from_openai(client, mode=mode).chat.completions.create_partial(
            model=MODEL, messages=MESSAGES, response_model=Mood, max_tokens=800, max_retries=0
        )
        assert last.mood in ("warm", "cold")


def use_ollama(url: str) -> None:
    import ollama

    client = ollama.Client(host=url, headers={"Authorization": f"Bearer {KEY}"})
    assert [model.model for model in client.list().models] == [MODEL]
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "format": SCHEMA}
    asked["options"] = {"num_predict": 400}
    assert json.loads(client.chat(**asked).message.content or "").keys() == {"city", "mood"}
    told = "".join(part.message.content or "" for part in client.chat(**asked, stream=True))
    assert json.loads(told).keys() == {"city", "mood"}
    assert client.generate(model=MODEL, prompt=QUESTION, options={"num_predict": 3}).done
    assert "tools" in (client.show(MODEL).capabilities or [])


CLIENTS = {name.removeprefix("use_"): of for name, of in globals().items() if name[:4] == "use_"}

if __name__ == "__main__":
    CLIENTS[sys.argv[1]](sys.argv[2])
