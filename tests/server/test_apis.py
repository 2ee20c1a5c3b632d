"""Tools, forms, and the APIs of others, asked of a model that says what a script has it say."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer as BackendTokenizer

from moescope.api import Model
from moescope.engine.sampling import Choice
from moescope.engine.sequence import Sequence
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.server.apis import Access, create_api
from moescope.server.experts import WITHOUT_PLACE
from moescope.server.messages import PING
from moescope.server.model_thread import ModelThread
from moescope.server.streams import COMMENT
from moescope.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function | tojson }}{% endfor %}]"
    "<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:"
    "{% if enable_thinking %}<think>{% endif %}"
    "{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function"}
TOOL["function"] = {"name": "weather", "description": "d", "parameters": WEATHER}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
SAID = f"<think>hm</think>I see.{CALL}\n{CALL}"
ASKED: list[Any] = [{"role": "user", "content": "weather?"}]


@pytest.fixture(scope="module")
def talker(model: Model) -> Model:
    """The small model with a longer context and a chat template that teaches tools."""
    fields = config_fields(model.config) | {"max_position_embeddings": 2048, "vocab_size": 320}
    backend = BackendTokenizer.from_str(model.tokenizer._backend.to_str())
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    tokenizer = Tokenizer(backend, {**model.tokenizer._config, "chat_template": TEMPLATE})
    network = CausalLM(read_config(fields))
    initialise(network, seed=0)
    return Model("small", network, tokenizer)


@contextmanager
def served(talker: Model, **options: Any) -> Iterator[TestClient]:
    thread = ModelThread(talker.engine, 4, 2**24)
    api = create_api(talker, thread, name="small", access=Access(**options))
    with TestClient(api, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture(scope="module")
def client(talker: Model) -> Iterator[TestClient]:
    with served(talker) as client:
        yield client


@pytest.fixture
def scripted(talker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every text be SAID."""
    ids = [*talker.tokenizer.encode(SAID), talker.tokenizer.eos_id or 0]

    def pick(_logits: Any, texts: list[Sequence]) -> list[Choice]:
        return [Choice(ids[len(t.ids) - t.prompt_tokens], -0.5) for t in texts]

    monkeypatch.setattr(talker.engine, "pick", pick)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def post(client: TestClient, path: str, **asked: Any) -> Any:
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.headers["content-type"] == "application/json" else answer.text


@pytest.mark.usefixtures("scripted")
def test_calls_are_told_apart_whole_and_streamed(client: TestClient) -> None:
    asked: dict[str, Any] = {"model": "small", "messages": ASKED, "tools": [TOOL]}
    whole = post(client, "/v1/chat/completions", **asked, logprobs=True)["choices"][0]
    message = whole["message"]
    assert whole["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("I see.", "hm")
    assert message["reasoning"] == "hm"
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "weather", "arguments": '{"city": "北京"}'}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    told = b"".join(bytes(one["bytes"]) for one in whole["logprobs"]["content"])
    assert told.decode() == SAID  # the end token is no part of it
    chunks = events(post(client, "/v1/chat/completions", **asked, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls: dict[int, list[Any]] = {}
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        known = calls.setdefault(call["index"], ["", "", 0])
        known[0] += call["function"].get("name", "")
        known[1] += call["function"]["arguments"]
        known[2] += "id" in call
    assert calls == {at: ["weather", '{"city": "北京"}', 1] for at in (0, 1)}
    assert sum("tool_calls" in delta for delta in deltas) > 6  # bit by bit
    assert "".join(delta.get("content") or "" for delta in deltas) == "I see."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    alone = post(client, "/v1/chat/completions", **asked, parallel_tool_calls=False)
    assert len(alone["choices"][0]["message"]["tool_calls"]) == 1
    without = post(client, "/v1/chat/completions", **asked, tool_choice="none")["choices"][0]
    assert without["message"]["content"] == SAID.partition("</think>")[2]
    assert "tool_calls" not in without["message"] and without["finish_reason"] == "stop"


def test_a_history_of_calls_is_rendered(client: TestClient) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}}
    history = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    asked: dict[str, Any] = {"messages": history, "tools": [TOOL], "tool_choice": "none"}
    told = post(client, "/tokenize", **asked)
    text = post(client, "/detokenize", tokens=told["tokens"])["prompt"]
    assert text.endswith('user:weather?\nassistant:!weather{"a":1}\ntool:sun\na:')
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == 2048
    made = post(client, "/v1/chat/completions", **asked, max_tokens=2)
    assert made["usage"]["completion_tokens"] <= 2
    kept = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "so "}]
    told = post(client, "/tokenize", messages=kept, continue_final_message=True)
    text = post(client, "/detokenize", tokens=told["tokens"])["prompt"]
    assert text.endswith("user:x\nassistant:so")
    for said in ("m", "<", "a:", "user:x"):  # what also stands elsewhere
        kept[-1]["content"] = said
        told = post(client, "/tokenize", messages=kept, continue_final_message=True)
        text = post(client, "/detokenize", tokens=told["tokens"])["prompt"]
        assert text.endswith(f"user:x\nassistant:{said}")
    switched = {"enable_thinking": True}
    told = post(client, "/tokenize", messages=ASKED, chat_template_kwargs=switched)
    assert post(client, "/detokenize", tokens=told["tokens"])["prompt"].endswith("a:<think>")


@pytest.mark.parametrize("seed", range(3))
def test_what_must_be_called_is_called(client: TestClient, seed: int) -> None:
    asked: dict[str, Any] = {"messages": ASKED, "tools": [TOOL], "max_tokens": 900, "seed": seed}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        made = post(client, "/v1/chat/completions", **asked, tool_choice=choice)["choices"][0]
        if made["finish_reason"] == "length":
            continue  # a number without end
        for call in made["message"]["tool_calls"]:
            assert json.loads(call["function"]["arguments"])["city"] in ("北京", "Rome")


@pytest.mark.parametrize("temperature", [0, 1, 1.7])
def test_texts_are_what_they_must_be(client: TestClient, temperature: float) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, "月"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: dict[str, Any] = {"temperature": temperature, "max_tokens": 200, "seed": 1}
    chat = post(client, "/v1/chat/completions", messages=ASKED, response_format=form, **asked)
    assert json.loads(chat["choices"][0]["message"]["content"])["a"] in (1, "月")
    assert chat["choices"][0]["finish_reason"] == "stop"
    form = {"type": "json_object", "schema": schema}  # as llama.cpp's clients say it
    text = post(client, "/v1/completions", prompt="x", response_format=form, **asked)
    assert json.loads(text["choices"][0]["text"])["a"] in (1, "月")
    for field in (
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_regex": "yes|no"},
        {"guided_grammar": 'root ::= "yes" | "no"'},
    ):
        several = post(client, "/v1/completions", prompt="x", n=3, **asked, **field)["choices"]
        assert {choice["text"] for choice in several} <= {"yes", "no"}


def test_a_thought_is_held_to_nothing(client: TestClient, talker: Model) -> None:
    asked: dict[str, Any] = {"messages": ASKED, "max_tokens": 30, "temperature": 0}
    switched = {"enable_thinking": True}
    end = talker.tokenizer.token_id("</think>")
    made = post(
        client,
        "/v1/chat/completions",
        **asked,
        chat_template_kwargs=switched,
        logit_bias={str(end): 100},
        guided_choice=["yes"],
    )["choices"][0]["message"]
    assert made["content"] == "yes"


def test_a_text_does_not_end_before_it_is_held(client: TestClient, talker: Model) -> None:
    asked: dict[str, Any] = {"messages": ASKED, "max_tokens": 30, "temperature": 0}
    asked |= {"chat_template_kwargs": {"enable_thinking": True}}
    asked |= {"logit_bias": {str(talker.tokenizer.eos_id): 100}}
    free = post(client, "/v1/chat/completions", **asked)["choices"][0]
    assert free["finish_reason"] == "stop"
    must_call = {"tools": [TOOL], "tool_choice": "required"}
    for held in ({"guided_choice": ["yes"]}, must_call):
        made = post(client, "/v1/chat/completions", **asked, **held)["choices"][0]
        assert made["finish_reason"] == "length"


def test_a_stream_that_waits_says_that_it_is_alive(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.server.streams.QUIET_SECONDS", 0.05)
    own = Model("small", talker.network, talker.tokenizer)
    step = own.engine.step

    def slow(*given: Any) -> Any:
        time.sleep(0.3)
        return step(*given)

    monkeypatch.setattr(own.engine, "step", slow)
    asked: dict[str, Any] = {"model": "small", "messages": ASKED, "max_tokens": 2, "stream": True}
    asked |= {"temperature": 0, "options": {"num_predict": 2}}
    with served(own) as client:
        for path, sign in (("/v1/chat/completions", COMMENT), ("/v1/messages", PING)):
            told = post(client, path, **asked)
            assert sign in told
            assert len(events(told)) > 2
        assert all(json.loads(line) for line in post(client, "/api/chat", **asked).splitlines())


def test_biases_and_the_least_of_tokens(client: TestClient, talker: Model) -> None:
    letter = talker.tokenizer.encode("b")[0]
    asked: dict[str, Any] = {"prompt": "x", "temperature": 0, "max_tokens": 5}
    biased = post(client, "/v1/completions", **asked, logit_bias={str(letter): 100})
    assert biased["choices"][0]["text"] == "bbbbb"
    ends = {str(talker.tokenizer.eos_id): 100}
    for least, made in ((0, 1), (3, 4)):
        answer = post(client, "/v1/completions", **asked, logit_bias=ends, min_tokens=least)
        assert answer["usage"]["completion_tokens"] == made
    stopped = post(
        client, "/v1/completions", **asked, stop_token_ids=[letter], logit_bias={str(letter): 100}
    )
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == 1


@pytest.mark.usefixtures("scripted")
def test_responses(client: TestClient) -> None:
    flat = {"type": "function", **TOOL["function"]}
    asked: dict[str, Any] = {"model": "small", "input": "weather?", "tools": [flat]}
    whole = post(client, "/v1/responses", **asked)
    assert whole["status"] == "completed"
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in whole["output"]] == kinds
    assert whole["output"][1]["content"][0]["text"] == "I see."
    assert whole["output"][2]["arguments"] == '{"city": "北京"}'
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    told = events(post(client, "/v1/responses", **asked, stream=True))
    assert [one["sequence_number"] for one in told] == list(range(len(told)))
    assert told[0]["type"] == "response.created" and told[-1]["type"] == "response.completed"
    arguments = "".join(
        one["delta"] for one in told if one["type"] == "response.function_call_arguments.delta"
    )
    assert arguments == '{"city": "北京"}' * 2
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        *whole["output"],
        {"type": "function_call_output", "call_id": "x", "output": "sun"},
    ]
    again = post(client, "/v1/responses", **asked | {"input": history}, max_output_tokens=2)
    assert again["status"] == "incomplete"
    assert again["incomplete_details"] == {"reason": "max_output_tokens"}
    refused = client.post("/v1/responses", json=asked | {"previous_response_id": "resp_1"})
    assert refused.status_code == 400 and "stores nothing" in refused.text


@pytest.mark.usefixtures("scripted")
def test_messages(client: TestClient) -> None:
    tool = {"name": "weather", "description": "d", "input_schema": WEATHER}
    asked: dict[str, Any] = {"model": "m", "max_tokens": 300, "messages": ASKED, "tools": [tool]}
    whole = post(client, "/v1/messages", **asked, system="be brief")
    assert [block["type"] for block in whole["content"]] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    assert whole["content"][2]["input"] == {"city": "北京"} and whole["stop_reason"] == "tool_use"
    told = events(post(client, "/v1/messages", **asked, stream=True))
    assert told[0]["type"] == "message_start" and told[-1]["type"] == "message_stop"
    assert [one["index"] for one in told if one["type"] == "content_block_stop"] == [0, 1, 2, 3]
    bits = [
        one["delta"].get("partial_json", "") for one in told if "index" in one and "delta" in one
    ]
    assert "".join(bits) == '{"city": "北京"}' * 2
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "1"}]}
    history = [
        *ASKED,
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result]},
    ]
    counted = post(client, "/v1/messages/count_tokens", **asked | {"messages": history})
    assert counted["input_tokens"] > 50
    refused = client.post("/v1/messages", json={"messages": ASKED})
    assert refused.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.usefixtures("scripted")
def test_messages_tell_what_stopped_them(client: TestClient) -> None:
    asked: dict[str, Any] = {"messages": ASKED, "max_tokens": 900}
    for stops, reason, which in (
        (["see", "ee."], "stop_sequence", "see"),
        (["nowhere"], "end_turn", None),
    ):
        told = post(client, "/v1/messages", **asked, stop_sequences=stops)
        assert (told["stop_reason"], told["stop_sequence"]) == (reason, which)
        streamed = events(post(client, "/v1/messages", **asked, stop_sequences=stops, stream=True))
        delta = next(e["delta"] for e in streamed if e["type"] == "message_delta")
        assert delta == {"stop_reason": reason, "stop_sequence": which}


@pytest.mark.usefixtures("scripted")
def test_ollama(client: TestClient) -> None:
    asked: dict[str, Any] = {"model": "small:latest", "messages": ASKED, "tools": [TOOL]}
    whole = post(client, "/api/chat", **asked, stream=False)
    assert whole["done"] and whole["message"]["thinking"] == "hm"
    called = {"function": {"name": "weather", "arguments": {"city": "北京"}}}
    assert whole["message"]["tool_calls"] == [called] * 2
    lines = [json.loads(line) for line in post(client, "/api/chat", **asked).splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "I see."
    assert [line["message"].get("tool_calls") for line in lines][-2] == [called] * 2
    assert lines[-1]["done"] and lines[-1]["eval_count"] == whole["eval_count"]
    plain = post(client, "/api/generate", model="small", prompt="x", stream=False)
    assert plain["response"].startswith("I see.") and plain["thinking"] == "hm"
    assert client.get("/api/tags").json()["models"][0]["name"] == "small"
    assert "tools" in post(client, "/api/show", model="small")["capabilities"]
    assert "version" in client.get("/api/version").json()
    assert client.post("/api/show", json={"model": "no"}).json()["error"].startswith("model 'no'")


def test_a_raw_prompt_is_read_as_it_stands(client: TestClient, model: Model) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": "the moon", "stream": False}
    asked["options"] = {"temperature": 0, "num_predict": 5}
    plain = post(client, "/v1/completions", prompt="the moon", temperature=0, max_tokens=5)
    raw = post(client, "/api/generate", **asked, raw=True)
    assert raw["response"] == plain["choices"][0]["text"]
    assert raw["prompt_eval_count"] == plain["usage"]["prompt_tokens"]
    written = post(client, "/api/generate", **asked)
    assert written["prompt_eval_count"] > raw["prompt_eval_count"]
    refused = client.post("/api/generate", json=asked | {"raw": True, "system": "x"})
    assert refused.status_code == 400 and "leave system out" in refused.text
    config = {k: v for k, v in model.tokenizer._config.items() if k != "chat_template"}
    untaught = Model("small", model.network, Tokenizer(model.tokenizer._backend, config))
    with served(untaught) as bare:
        assert post(bare, "/api/generate", **asked)["prompt_eval_count"] > 0
        refused = bare.post("/api/generate", json=asked | {"system": "x"})
        assert refused.status_code == 400 and "leave system out" in refused.text


def test_what_lm_eval_asks_of_a_tokenizer(client: TestClient, talker: Model) -> None:
    told = client.get("/tokenizer_info").json()
    ends = post(client, "/tokenize", prompt=told["eos_token"], add_special_tokens=False)
    assert ends["tokens"] == [talker.tokenizer.eos_id]
    assert told["chat_template"] == talker.tokenizer.chat_templates["default"]


def test_the_rest(client: TestClient) -> None:
    assert client.get("/v1/models/").json()["data"][0]["id"] == "small"
    refused = client.post("/v1/embeddings", json={"input": "x"})
    assert refused.status_code == 400 and "makes no embeddings" in refused.text
    document = client.get("/openapi.json").json()
    assert {"ChatRequest", "MessagesRequest"} <= set(document["components"]["schemas"])
    assert "/v1/responses" in document["paths"]
    echoed = post(client, "/v1/completions", prompt="the moon", echo=True, max_tokens=2)
    assert echoed["choices"][0]["text"].startswith("the moon")


def test_numbers_that_no_json_has_are_refused(client: TestClient) -> None:
    for number in ("NaN", "-Infinity", "1e999", "9" * 400 + ".0"):
        told = f'{{"model": "small", "input": "x", "metadata": {{"a": [{number}]}}}}'
        headers = {"content-type": "application/json"}
        refused = client.post("/v1/responses", content=told, headers=headers)
        assert refused.status_code == 400 and "not finite" in refused.text


def test_a_thought_in_a_history_is_text(client: TestClient) -> None:
    said = {"role": "user", "content": "weather?"}
    for content in (None, [], "hm", ["hm"], [{"type": "reasoning_text", "text": "hm"}]):
        item = {"type": "reasoning", "summary": [], "content": content}
        post(client, "/v1/responses", input=[said, item, said], max_output_tokens=1)
    for content in (5, [5], [{"type": "image"}], {"text": 5}):
        item = {"type": "reasoning", "content": content}
        asked = {"model": "small", "input": [said, item]}
        refused = client.post("/v1/responses", json=asked)
        assert refused.status_code == 400 and "part" in refused.text


EXPERTS: dict[str, Any] = {"return_routed_experts": True, "moe_trace": True}
EXPERTS |= {"num_experts_per_tok": 2, "disable_experts": [[1, 0]], "force_experts": [[2, 5]]}


def told_of_experts(client: TestClient, api: str, *, stream: bool, **more: Any) -> dict[str, Any]:
    """What an API tells of a short answer's experts, by the names of the fields."""
    asked: dict[str, Any] = {"model": "small", "stream": stream, **more}
    if api.startswith("/api/"):
        asked["options"] = {"temperature": 0, "num_predict": 6, **asked.pop("options", {})}
    else:
        asked |= {"temperature": 0, "max_tokens": 6}
    if api == "/v1/responses":
        asked |= {"input": "weather?", "max_output_tokens": asked.pop("max_tokens")}
    elif api == "/api/generate":
        asked |= {"prompt": "weather?"}
    else:
        asked |= {"messages": ASKED}
    answer = post(client, api, **asked)
    if not stream:
        told = [answer | answer.get("choices", [{}])[0]]
    elif api.startswith("/api/"):
        told = [json.loads(line) for line in answer.splitlines()]
    else:
        told = [e.get("response", e) for e in events(answer) if e["type"] != "message_start"][-3:]
    names = ("prompt_routed_experts", "routed_experts", "moe_trace")
    parts = [{name: one[name] for name in names if name in one} for one in told]
    parts = [part for part in parts if part]
    if api.startswith("/api/") and stream:  # with each token
        assert len(parts) == 6
        joined = {"prompt_routed_experts": parts[0]["prompt_routed_experts"]}
        joined["routed_experts"] = [row for p in parts for row in p.get("routed_experts", [])]
        joined["moe_trace"] = parts[0]["moe_trace"]
        for field in ("experts", "weights", "scores"):
            joined["moe_trace"][field] = [row for p in parts for row in p["moe_trace"][field]]
        return joined
    assert all(part == parts[0] for part in parts) and len(parts) >= 1
    return parts[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["/v1/responses", "/v1/messages", "/api/chat", "/api/generate"])
def test_every_api_tells_of_experts_and_steers_them(
    client: TestClient, api: str, stream: bool
) -> None:
    chat = told_of_experts(client, "/v1/chat/completions", stream=False, **EXPERTS)
    chosen = {
        (layer, expert)
        for token in chat["routed_experts"]
        for layer, experts in zip((1, 2), token, strict=True)
        for expert in experts
    }
    assert (1, 0) not in chosen and (2, 5) in chosen
    told = told_of_experts(client, api, stream=stream, **EXPERTS)
    assert told["routed_experts"] == chat["routed_experts"]
    assert told["prompt_routed_experts"] == chat["prompt_routed_experts"]
    for field in ("layers", "experts"):
        assert told["moe_trace"][field] == chat["moe_trace"][field]
    theirs = told["moe_trace"]["weights"], chat["moe_trace"]["weights"]
    torch.testing.assert_close(*map(torch.tensor, theirs), rtol=1e-3, atol=1e-5)
    if api.startswith("/api/"):  # Ollama's own clients can send nothing but options
        assert told_of_experts(client, api, stream=stream, options=EXPERTS) == told


@pytest.mark.parametrize("api", ["/v1/responses", "/v1/messages", "/api/chat", "/api/generate"])
def test_what_has_no_place_in_an_api_is_refused_by_name(client: TestClient, api: str) -> None:
    asked: dict[str, Any] = {"model": "small", "max_tokens": 4, "input": "x"}
    if api == "/api/generate":
        asked["prompt"] = "x"
    asked |= {"messages": ASKED}
    refused = [client.post(api, json=asked | {"prompt_logprobs": 1})]
    refused.append(client.post(api, json=asked | {"disable_experts": [[9, 9]]}))
    if api.startswith("/api/"):
        refused.append(client.post(api, json=asked | {"options": {"prompt_logprobs": 1}}))
        refused.append(client.post(api, json=asked | {"options": {"force_experts": "all"}}))
    assert [answer.status_code for answer in refused] == [400] * len(refused)
    names = ["prompt_logprobs", "9:9", "prompt_logprobs", "force_experts"]
    for answer, name in zip(refused, names, strict=False):
        assert name in answer.text
    for name in WITHOUT_PLACE:
        answer = client.post(api, json=asked | {name: {"type": "json_object"}})
        assert answer.status_code == 400 and f"no place for {name};" in answer.text
    if api.startswith("/api/"):
        answer = client.post(api, json=asked | {"options": {"mirostat": 2}})
        assert answer.status_code == 400 and "does not know mirostat" in answer.text
