"""What the OpenAI API tells of experts, and what a server counts."""

import threading
from itertools import chain
from typing import Any

import pytest
import torch
from packing import expert_reader
from questions import events_of
from small_server import PROMPT, expected, numbers, served, text_of
from starlette.testclient import TestClient

from moescope.api import Model, sampling_params
from moescope.engine.routed import RoutingRecorder
from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM
from moescope.native.network import Packer
from moescope.server.texts import refuse_too_much


def routing_of(model: Model, ids: list[int]) -> list[list[list[int]]]:
    """What each router chooses for each token, `[tokens, layers, top_k]`."""
    recorder = RoutingRecorder()
    with torch.inference_mode():
        model.network.model(torch.tensor([ids]), recorder=recorder)
    chosen = recorder.chosen()
    assert chosen is not None
    return chosen.ids.transpose(0, 1).tolist()


def pieces_of(client: TestClient, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, but the last, which says that it is done."""
    streamed = client.post(path, json=asked | {"stream": True}).text
    return events_of(streamed.removesuffix("data: [DONE]\n\n"))


def test_routed_experts_have_the_names_and_shape_of_vllm(client: TestClient, talker: Model) -> None:
    ids = talker.engine.encode(PROMPT)
    asked = {"prompt": ids, "max_tokens": 6, "temperature": 0, "n": 2, "moe_trace": True}
    asked |= {"return_routed_experts": True, "ignore_eos": True}
    whole = client.post("/v1/completions", json=asked).json()
    made = [token.id for token in expected(talker, PROMPT, max_tokens=6, ignore_eos=True)]
    experts = routing_of(talker, [*ids, *made[:-1]])
    assert whole["prompt_routed_experts"] == experts[: len(ids)]
    for choice in whole["choices"]:
        assert choice["routed_experts"] == experts[len(ids) :]
        trace = choice["moe_trace"]
        assert (trace["start"], trace["layers"], trace["experts"]) == (0, [1, 2], experts)
        weights, scores = torch.tensor(trace["weights"]), torch.tensor(trace["scores"])
        assert weights.shape == scores.shape == (len(experts), 2, 3) and (scores > 0).all()
        factor = talker.config.routed_scaling_factor
        normalised = scores / scores.sum(-1, keepdim=True) * factor
        torch.testing.assert_close(
            weights, normalised if talker.config.norm_topk_prob else scores * factor
        )
    pieces = pieces_of(client, "/v1/completions", asked)
    assert [p["prompt_routed_experts"] for p in pieces if "prompt_routed_experts" in p] == [
        experts[: len(ids)]
    ]
    for row in (0, 1):
        own = [c for piece in pieces for c in piece["choices"] if c["index"] == row]
        traced = [c["moe_trace"] for c in own if "moe_trace" in c]
        assert [one["start"] for one in traced] == [0, *range(len(ids), len(experts))]
        assert list(chain(*(one["experts"] for one in traced))) == experts
        assert list(chain(*(c.get("routed_experts", []) for c in own))) == experts[len(ids) :]
    several = client.post("/v1/completions", json=asked | {"prompt": [ids, ids[:3]], "n": 1}).json()
    assert [c["prompt_routed_experts"] for c in several["choices"]] == [
        experts[: len(ids)],
        experts[:3],
    ]


def test_a_chat_tells_its_experts_with_each_event(client: TestClient, talker: Model) -> None:
    messages = [{"role": "user", "content": "moon"}]
    ids = talker.engine.encode_chat(messages)
    asked = {"messages": messages, "max_tokens": 5, "temperature": 0, "moe_trace": True}
    asked |= {"return_routed_experts": True, "ignore_eos": True}
    whole = client.post("/v1/chat/completions", json=asked).json()
    choice = whole["choices"][0]
    experts = [*whole["prompt_routed_experts"], *choice["routed_experts"]]
    assert len(experts) == len(ids) + 4 and choice["moe_trace"]["experts"] == experts
    assert experts[: len(ids)] == routing_of(talker, ids)
    pieces = pieces_of(client, "/v1/chat/completions", asked)
    traced = [c["moe_trace"] for p in pieces for c in p["choices"] if "moe_trace" in c]
    assert [one["start"] for one in traced] == [0, *range(len(ids), len(ids) + 4)]
    assert list(chain(*(one["experts"] for one in traced))) == experts


def test_a_request_may_steer_the_routers_and_no_other_is_changed(
    client: TestClient, talker: Model
) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_routed_experts": True}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"num_experts_per_tok": 1}, {"num_experts_per_tok": 1}),
        ({"disable_experts": [[1, 0], [2, 3]]}, {"disabled": [(1, 0), (2, 3)]}),
        ({"force_experts": [[2, 7]]}, {"forced": [(2, 7)]}),
    ]
    texts = [text_of(list(talker.steer(**c).stream(PROMPT, max_tokens=12))) for _, c in changes]
    assert len(set(texts)) > 1
    told: dict[int, Any] = {}

    def ask(at: int) -> None:
        answer = client.post("/v1/completions", json=asked | changes[at % len(changes)][0])
        told[at] = answer.json()["choices"][0]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(3 * len(changes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == len(threads)
    for at, choice in told.items():
        assert choice["text"] == texts[at % len(changes)]
    assert {len(slots) for token in told[1]["routed_experts"] for slots in token} == {1}
    assert all(7 in token[1] for token in told[3]["routed_experts"])


def test_no_request_is_told_more_of_its_prompts_than_a_server_should_hold(model: Model) -> None:
    prompts, traced = [[5] * 1000] * 8, sampling_params({"routed_experts": True})
    scored = sampling_params({"prompt_logprobs": 20})
    refuse_too_much(model.config, prompts, [scored, traced])  # 8,000 * (21 + 3 * 3)
    for params in ([scored] * 6, [traced] * 14):
        with pytest.raises(UserError, match=r"1,008,000 numbers about its prompts; ask for 1,000"):
            refuse_too_much(model.config, prompts, params)
    with pytest.raises(UserError, match="no routed experts of which to tell"):
        dense = model.config.model_copy(update={"n_routed_experts": None})
        refuse_too_much(dense, [[5]], [traced])


def test_the_load_of_each_expert_is_counted(talker: Model) -> None:
    with served(talker) as (client, _):
        before = numbers(client)
        asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_routed_experts": True}
        told = client.post("/v1/completions", json=asked | {"ignore_eos": True}).json()
        after = numbers(client)
    experts = [*told["prompt_routed_experts"], *told["choices"][0]["routed_experts"]]
    names = [name for name in after if name.startswith("moescope_expert_tokens_total")]
    assert len(names) == 2 * 8
    for layer in (1, 2):
        for expert in range(8):
            name = f'moescope_expert_tokens_total{{expert="{expert}",layer="{layer}"}}'
            served_tokens = sum(expert in token[layer - 1] for token in experts)
            assert after[name] - before[name] == served_tokens


def test_tokens_and_answers_are_counted(talker: Model) -> None:
    with served(talker) as (client, _):
        for status in (200, 404):
            asked = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "n": 2}
            name = {200: "small", 404: "other"}[status]
            assert (
                client.post("/v1/completions", json=asked | {"model": name}).status_code == status
            )
        client.get("/nowhere/at/all")
        found = numbers(client)
    answered = 'moescope_requests_total{path="/v1/completions",status="%s"}'
    assert found[answered % 200] == found[answered % 404] == 1
    assert found['moescope_requests_total{path="other",status="404"}'] == 1
    assert found["moescope_prompt_tokens_total"] == len(talker.engine.encode(PROMPT))
    assert found["moescope_generated_tokens_total"] == 6
    assert found["moescope_time_to_first_token_seconds_count"] == 2
    assert found["moescope_time_per_output_token_seconds_count"] == 4
    assert found["moescope_request_seconds_count"] == 1
    assert found["moescope_requests_waiting"] == 0


@pytest.mark.skipif(not cpu.available(), reason="no native kernels")
def test_the_weight_bytes_read_are_what_the_routing_says(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = CausalLM(talker.config)
    network.load_state_dict(talker.network.state_dict())
    packer = Packer("int8")
    state = network.state_dict()

    packer.pack(network, lambda name: state[name], expert_reader(state))
    packed = Model("small", network, talker.tokenizer)
    ids = packed.engine.encode(PROMPT)
    trace = packed.trace(PROMPT, max_tokens=5, temperature=0.0)
    with served(packed) as (client, thread):
        thread.engine.blocks.least_copied = 1
        before = numbers(client)["moescope_weight_bytes_read_total"]
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0}
        client.post("/v1/completions", json=asked)
        middle = numbers(client)["moescope_weight_bytes_read_total"]
        # All of the prompt but its last token is known now; then five tokens are read singly.
        client.post("/v1/completions", json=asked)
        again = numbers(client)["moescope_weight_bytes_read_total"]
        client.post("/v1/completions", json=asked | {"max_tokens": 6})
        after = numbers(client)["moescope_weight_bytes_read_total"]
    assert middle - before > again - middle > 0
    singly = [token.weight_bytes for token in trace.tokens[len(ids) :]]
    assert after - again - (again - middle) == sum(singly[:5])
