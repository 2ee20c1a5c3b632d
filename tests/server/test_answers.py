"""The API's numbers are the engine's."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from questions import TEXT, events_of, write_run
from starlette.testclient import TestClient

import moescope
from moescope.api import Model, sampling_params
from moescope.checkpoint import save_weights
from moescope.model.costs import count_parameters
from moescope.scope.detail import Reading
from moescope.scope.reasoning import FILE as REASONING, ReasoningHistory
from moescope.scope.steps import read
from moescope.server import schema
from moescope.server.app import create_app
from moescope.server.studio import Studio

STEERING = {"num_experts_per_tok": 2, "disabled": [{"layer": 1, "expert": 3}], "noise": 0.2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the page computes with small models; more threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steered(model: Model) -> Model:
    return model.steer(num_experts_per_tok=2, disabled={(1, 3)}, noise=0.2)


def plain(answer: Any) -> Any:
    """What JSON makes of the engine's own data."""
    return TypeAdapter(type(answer)).dump_python(answer, mode="json")


def test_the_model_is_described(client: TestClient, model: Model) -> None:
    info = client.get("/api/model").json()
    assert [layer["kind"] for layer in info["layers"]] == ["dense", "moe", "moe"]
    assert info["layers"][1] == {
        **{"kind": "moe", "n_routed_experts": 8, "n_shared_experts": 1},
        "by_table": False,
    }
    assert info["sampling"] == schema.SamplingRequest().model_dump()
    counted = count_parameters(model.config)
    assert info["parameters"] == {"total": counted.total, "active": counted.active}
    assert round(info["reference"]["total"] / 1e9) == 671
    assert info["cache"] == {"kind": "latent", "kept": 16 + 4, "full": 2 * (8 + 8)}
    assert info["companions"] == [
        {"name": "small-dense", "role": "dense", "problem": None},
        {"name": "small-unbalanced", "role": "unbalanced", "problem": None},
    ]
    assert (info["has_training"], info["watching"]) == (1, 0)
    assert {e["domain"] for e in info["examples"]} >= {"poetry", "prose", "code", "arithmetic"}
    asked = [e["text"] for e in info["examples"] if e["domain"] == "arithmetic"]
    assert info["question_form"] == "<｜User｜>{question}<｜Assistant｜>" and info["thinks"]
    assert asked[0] == "<｜User｜>17+25=?<｜Assistant｜>"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_first_answer_holds_what_others_would(client: TestClient, language: str) -> None:
    start = client.get(f"/api/start/{language}").json()
    assert start["model"] == client.get("/api/model").json()
    assert start["specialization"] == client.get("/api/specialization").json()
    example = next(e for e in start["model"]["examples"] if e["language"] == language)
    assert start["prompt"] == example["text"]
    trace = client.post("/api/trace", json={"prompt": start["prompt"]}).json()
    assert start["steps"] == trace["steps"]
    assert "17+25" in start["hero"]["prompt"]
    told = client.post("/api/generate", json=start["hero"]).text
    assert len(events_of(told)) > 10
    assert client.post("/api/generate", json=start["hero"]).text == told  # kept, seconds and all
    assert client.get("/api/start/fr").status_code == 404


@pytest.mark.parametrize("steering", [{}, STEERING])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_k": 50}])
def test_a_stream_holds_the_prompt_what_generate_makes_and_the_end(
    client: TestClient, model: Model, steering: dict[str, Any], sampling: dict[str, Any]
) -> None:
    question = {"prompt": TEXT, "max_tokens": 6, "sampling": sampling, "steering": steering}
    answer = client.post("/api/generate", json=question)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *tokens, end = events_of(answer.text)
    made = (steered(model) if steering else model).generate(TEXT, max_tokens=6, **sampling)
    ids = [*model.engine.encode(TEXT), *(token.id for token in made.tokens)]
    assert [event["step"]["id"] for event in tokens] == ids
    assert {event["type"] for event in tokens} == {"token"}
    assert end["end"].pop("seconds") > 0
    told = {"finish_reason": made.finish_reason, "prompt_tokens": made.prompt_tokens}
    assert end == {"type": "end", "end": told | {"new_tokens": len(made.tokens)}}


def test_ids_are_continued_as_they_stand(client: TestClient, model: Model) -> None:
    ids = [7, 8, 9]
    *tokens, _ = events_of(client.post("/api/generate", json={"ids": ids, "max_tokens": 2}).text)
    assert [event["step"]["id"] for event in tokens][:3] == ids
    likeliest = model.logits(torch.tensor([ids]))[0, -1].argmax()
    assert tokens[3]["step"]["id"] == int(likeliest)


def test_a_text_that_grows_is_read_on_from_where_it_was(home: Path) -> None:
    studio = Studio.open(str(home))
    ids, read_at_once = studio.model.engine.encode(TEXT), list[int]()
    decoder = studio.model.network.model
    decoder.register_forward_pre_hook(lambda _, given: read_at_once.append(given[0].shape[1]))
    for length in (3, 4, 6, 5):
        asked = schema.TokenRequest(ids=ids[:length], index=length - 1, layer=1)
        studio.token(asked)
    assert read_at_once == [3, 1, 2, 5]  # the last one branches off


@pytest.mark.parametrize("steering", [{}, STEERING])
def test_a_trace_is_what_the_scope_reads(
    client: TestClient, model: Model, steering: dict[str, Any]
) -> None:
    answer = client.post("/api/trace", json={"prompt": TEXT, "steering": steering}).json()
    engine = (steered(model) if steering else model).engine
    steps = read(engine, model.engine.encode(TEXT))
    assert answer["steps"] == plain(steps)


def test_a_token_and_an_expert_are_what_the_scope_takes_apart(
    client: TestClient, model: Model
) -> None:
    ids = model.engine.encode(TEXT)
    sampling = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    place = {"ids": ids, "index": 5, "layer": 2, "steering": STEERING}
    answer = client.post("/api/token", json={**place, "sampling": sampling}).json()
    reading = Reading(steered(model).engine, ids)
    expected = reading.token(5, 2, sampling_params(sampling))
    assert answer == plain(expected)
    work = client.post("/api/expert", json={**place, "expert": 1}).json()
    mine = reading.expert(5, 2, 1)
    assert work["work"] == plain(mine)
    assert work["typical"] == [{"id": 299, "text": "x", "count": 3, "lift": 2.5, "context": "axb"}]
    assert work["domains"] == {"poetry": 0.125, "prose": 0.75}


def test_the_dense_twin_reads_the_same_text(client: TestClient, home: Path, model: Model) -> None:
    answer = client.post("/api/dense", json={"prompt": TEXT}).json()
    ours, twin = answer["contestants"]
    assert (ours["name"], twin["name"]) == (str(home), "small-dense")
    ids = torch.tensor([model.engine.encode(TEXT)])
    logprobs = model.logits(ids)[0, :-1].log_softmax(dim=-1)
    losses = -logprobs.gather(1, ids[0, 1:, None])[:, 0]
    assert ours["losses"] == pytest.approx(losses.tolist(), rel=1e-4)
    assert len(twin["losses"]) == len(ours["losses"]) and twin["losses"] != ours["losses"]
    for contestant in (ours, twin):
        assert contestant["milliseconds_per_token"] > 0 and contestant["flops_per_token"] > 0
    assert twin["parameters"]["total"] == twin["parameters"]["active"]
    counted = count_parameters(model.config)
    assert ours["flops_per_token"] == 2 * (counted.active_without_embedding - counted.norm)
    trace = model.trace(TEXT)
    read = sum(token.weight_bytes for token in trace.tokens) / len(trace.tokens)
    assert ours["bytes_per_token"] == round(read)


def test_a_dense_model_of_the_whole_size_reads_it_too(
    home: Path, model: Model, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    for name in ("small", "small-dense"):
        shutil.copytree(home.with_name(name), shelf / name)
    shutil.copytree(home.with_name("small-dense"), shelf / "small-large")
    write_run(shelf / "small-dense", steps=5)
    studio = Studio.open(str(shelf / "small"))
    assert {c.role for c in studio.companions} == {"dense", "large"}
    answer = studio.dense(schema.DenseRequest(prompt=TEXT))
    assert [c.name.rpartition("/")[2] for c in answer.contestants] == [
        *("small", "small-dense", "small-large")
    ]
    assert answer.held_out == {}  # nothing was kept of the third's training
    own = answer.steps[0]
    assert own is not None and answer.steps == [own, 5, None]
    write_run(shelf / "small-large", steps=2)
    answer = studio.dense(schema.DenseRequest(prompt=TEXT))
    assert answer.held_out == {"poetry": [1.0, 0.5, 1.0], "prose": [0.5, 0.25, 0.5]}
    assert answer.steps == [own, 5, 2]


def test_the_copy_trained_without_balancing_reads_the_same_text(
    client: TestClient, home: Path, model: Model
) -> None:
    answer = client.post("/api/unbalanced", json={"prompt": TEXT}).json()
    assert (answer["name"], answer["steps"], answer["own_steps"]) == ("small-unbalanced", 2, 3)
    assert answer["layers"] == [1, 2] and answer["domains"] == [] == answer["domain_load"]
    trace = moescope.load(home.with_name("small-unbalanced")).trace(TEXT)
    for layer, load in zip(answer["layers"], answer["load"], strict=True):
        router = trace.layers[layer].router
        assert router is not None
        slots = sum(len(ids) for ids in router.topk_ids)
        assert load == pytest.approx([count / slots for count in router.load])


def test_specialization_is_what_was_measured(client: TestClient) -> None:
    answer = client.get("/api/specialization").json()
    assert answer["domains"] == ["poetry", "prose"] and answer["layers"] == [1, 2]
    assert answer["load"][1][0][:2] == [0.25, 0.75]
    assert answer["mutual_information"] == [0.1, 0.2]
    card = {"zh": None, "en": None, "tokens": ["x"], "domain": 1, "domain_share": 0.75 / 0.875}
    assert answer["cards"][0][1] == card


def test_the_training_is_told_from_its_own_files(client: TestClient) -> None:
    answer = client.get("/api/training").json()
    assert answer["steps"] == 3 and answer["domains"] == ["poetry", "prose"]
    assert answer["rows"][1] == {
        "step": 2,
        "loss": 1.5,
        "held_out": {"poetry": 1.0, "prose": 0.5},
        "max_violation": {"1": 0.5, "2": 0.25},
        "experts_per_token": {},
        "load": {},
    }
    (snapshot,) = answer["snapshots"]
    assert snapshot["step"] == 2
    assert snapshot["load"] == [[[0.25, 0.75], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]


def test_reinforcement_is_told_whatever_model_is_shown(client: TestClient) -> None:
    answer = client.get("/api/reasoning").json()
    kept = ReasoningHistory.from_file(REASONING)
    assert len(answer["questions"]) == 40
    assert ReasoningHistory.from_json(json.dumps(answer)) == kept


def test_a_bare_model_says_what_is_missing(model: Model) -> None:
    with TestClient(create_app(Studio(model)), base_url="http://localhost") as bare:
        info = bare.get("/api/model").json()
        assert (info["has_training"], info["companions"]) == (0, [])
        for answer, words in (
            (bare.get("/api/specialization"), "nothing is known of what the experts of small"),
            (bare.get("/api/training"), "the history of the training of small was not kept"),
            (bare.get("/api/training/live"), "no training is watched"),
            (bare.post("/api/dense", json={"prompt": "x"}), "there is no dense twin beside small"),
            (
                bare.post("/api/unbalanced", json={"prompt": "x"}),
                "there is no copy trained without balancing beside small",
            ),
        ):
            assert answer.status_code == 404
            assert answer.json()["type"] == "error" and words in answer.json()["message"]
        place = {"prompt": "x", "index": 0, "layer": 1, "expert": 0}
        work = bare.post("/api/expert", json=place).json()
        assert (work["typical"], work["domains"]) == ([], {})


def test_companions_that_cannot_be_opened_are_named(
    home: Path, model: Model, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    shutil.copytree(home, shelf / "small")
    shutil.copytree(home.with_name("small-dense"), shelf / "small-dense")
    (shelf / "small-unbalanced").mkdir()
    (shelf / "small-unbalanced" / "config.json").write_text("{")
    (shelf / "small-notes").mkdir()
    shutil.copytree(home, shelf / "small-other")  # of the same shape, but nothing says what it is
    with TestClient(create_app(Studio.open(str(shelf / "small"))), base_url="http://[::1]") as page:
        dense, copy = page.get("/api/model").json()["companions"]
        assert (dense["role"], dense["problem"]) == ("dense", None)
        assert (copy["role"], copy["name"]) == ("unbalanced", "small-unbalanced")
        assert "config.json" in copy["problem"]
        answer = page.post("/api/unbalanced", json={"prompt": "x"})
        assert answer.status_code == 404
        assert "the copy trained without balancing cannot be opened" in answer.json()["message"]
        shutil.rmtree(shelf / "small-dense")  # between the start and the question
        answer = page.post("/api/dense", json={"prompt": "x"})
        assert answer.status_code == 400 and "small-dense" in answer.json()["message"]


def test_the_page_begins_as_the_models_own_files_say(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "small")
    told = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [1]}
    (tmp_path / "small" / "generation_config.json").write_text(json.dumps(told))
    sampling = Studio.open(str(tmp_path / "small")).info.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, None)


def test_a_refusal_has_a_code(client: TestClient) -> None:
    limit = client.get("/api/model").json()["context"]
    answer = client.post("/api/trace", json={"ids": [1] * (limit + 1)})
    assert answer.status_code == 400
    assert answer.json()["code"] == "context_full"
    assert answer.json()["values"] == {"n": limit + 1, "max": limit}


def test_a_layer_slider_reads_the_text_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio.open(str(home))  # of its own: a text that another test left may still be made
    passes: list[int] = []
    forward = studio.model.network.model.forward

    def counted(*given: Any, **more: Any) -> torch.Tensor:
        passes.append(1)
        return forward(*given, **more)

    monkeypatch.setattr(studio.model.network.model, "forward", counted)
    for layer in (0, 1, 2, 1):
        for index in (0, 3):
            studio.token(schema.TokenRequest(prompt="frost is it", index=index, layer=layer))
    studio.trace(schema.TextRequest(prompt="frost is it"))
    assert len(passes) == 1


def test_a_small_model_is_shown_in_float32(model: Model, tmp_path: Path) -> None:
    """In bfloat16 a stream and a trace of the same text may tell of different experts."""
    save_weights(model.network, tmp_path, dtype=torch.bfloat16)
    model.tokenizer.save(tmp_path)
    studio = Studio.open(str(tmp_path))
    assert studio.model.network.lm_head.weight.dtype == torch.float32
    asked = schema.GenerateRequest(prompt=TEXT, max_tokens=20)
    *tokens, _ = studio.generate(asked)
    steps = [event.step for event in tokens if isinstance(event, schema.TokenEvent)]
    again = studio.trace(schema.TextRequest(ids=[step.id for step in steps])).steps
    for mine, its in zip(steps, again, strict=True):
        experts = [layer and layer.topk_ids for layer in mine.layers]
        assert experts == [layer and layer.topk_ids for layer in its.layers]
