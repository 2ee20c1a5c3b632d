"""What a training logs and leaves behind, against `transformers` and plain loops."""

import json
import math
from pathlib import Path

import pytest
import torch
from small import ROUTER_FIELDS, Kept, rows, run, write_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope.checkpoint import load_model
from moescope.cli import main as cli
from moescope.model.routing import ROUTERS
from moescope.scope.history import history_of
from moescope.scope.texts import labelled_text
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.data import ShardIndex

pytestmark = pytest.mark.usefixtures("unmeasured")

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.toml"


def test_loads_and_repetitions_are_logged_and_kept_in_the_history(config, tmp_path: Path) -> None:
    said = run(config(training={"steps": 20}), tmp_path)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if "load" in row] == [10, 20]
    for layer in ("1", "2"):
        assert sum(logged[9]["load"][layer]) == pytest.approx(1, abs=1e-5)
        assert logged[9]["experts_per_token"][layer] == pytest.approx(2)
        busiest = max(logged[9]["load"][layer]) * 4 - 1
        assert logged[9]["max_violation"][layer] == pytest.approx(busiest, abs=1e-4)
    history = history_of(tmp_path)
    assert [row.step for row in history.rows if row.load] == [10, 20]
    assert history.rows[3].experts_per_token == {"1": 2.0, "2": 2.0}
    summary = json.loads((tmp_path / "training.json").read_text())
    read = 20 * 4 * 24
    index = json.loads((tmp_path / "shards" / "train" / "index.json").read_text())
    tokens = {shard["domain"]: shard["tokens"] for shard in index["shards"]}
    assert sum(summary["epochs"][d] * n for d, n in tokens.items()) == pytest.approx(read)
    assert f"read: poetry {summary['epochs']['poetry']:.2g} times" in said
    assert "20 steps read poetry" in said


@pytest.mark.parametrize("topk_method", ["expert_choice", "sinkhorn"])
def test_where_tokens_compete_within_a_micro_batch_it_is_said(
    topk_method: str, config, tmp_path: Path
) -> None:
    model = {"topk_method": topk_method, "scoring_func": "softmax"}
    said = run(config(model=model, training={"steps": 1}), tmp_path)
    assert f"{topk_method}: the 48 tokens of a micro batch compete for experts" in said
    assert "micro_batch_size 2 is part of this recipe" in said


def test_expert_choice_learns_thresholds_that_keep_its_number_of_experts(
    config, tmp_path: Path
) -> None:
    model = {"topk_method": "expert_choice", "scoring_func": "softmax", "n_routed_experts": 8}
    training = {"steps": 40, "batch_size": 16, "micro_batch_size": 16, "dtype": "float32"}
    run(config(model=model, training=training, balance={"sequence_aux": 0.0}), tmp_path)
    network = load_model(tmp_path)
    ids = torch.tensor([Tokenizer.load(tmp_path).encode("There were 7 books upon the shelf.")])
    kept = Kept()
    with torch.no_grad():
        whole = network.logits(network(ids, recorder=kept))
        alone = network.logits(network(ids[:, :5]))
    torch.testing.assert_close(whole[:, :5], alone, atol=1e-5, rtol=1e-4)
    assert 1 < float((kept.routings[1].topk_ids >= 0).sum()) / ids.shape[1] < 4


def test_the_smoke_recipe_learns(corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_file(
        SMOKE, {"data": {"source": corpus}, "model": {"vocab_size": 300}}
    )
    run(config, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert max(losses[-5:]) < losses[0] - 1
    first, last = [row["held_out_loss"] for row in rows(tmp_path) if "held_out_loss" in row]
    assert set(first) == {"prose", "poetry", "sums"}
    assert all(last[domain] < first[domain] < math.log(300) for domain in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, vocabulary: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder / "config.toml", training={"steps": 20, "dtype": "float32"})
    data = {"source": corpus, "tokenizer": vocabulary}
    run(TrainConfig.from_file(path, {"data": data}), folder / "out")
    return folder / "out"


def test_transformers_opens_the_result_and_sees_the_same(finished: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    ours = load_model(finished)
    text = "There were 7 books upon the shelf. 床前明月光 3 + 4"
    ids = AutoTokenizer.from_pretrained(finished)(text, return_tensors="pt").input_ids
    assert ids[0].tolist()[-20:] == Tokenizer.load(finished).encode(text)[-20:]
    with torch.no_grad():
        logits = ours.logits(ours(ids))
        assert logits.std() > 0.5
        torch.testing.assert_close(logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)


def test_evaluation_is_a_float64_loop_of_transformers(finished: Path, corpus: Path) -> None:
    """Each held-out token but the first is predicted once, in rows of 24, up to 200."""
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float64)
    model.set_experts_implementation("eager")
    tokenizer = Tokenizer.load(finished)
    load = {1: torch.zeros(4, dtype=torch.int64)}

    def count(_module: object, inputs: tuple[Tensor, ...]) -> None:
        load[1] += torch.bincount(inputs[1].flatten(), minlength=4)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(count)
    summary = json.loads((finished / "training.json").read_text())
    shown = json.loads((finished / "expert_load.json").read_text())["load"]
    series = (finished / "expert_load.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in series] == [20]
    assert json.loads(series[-1])["load"] == shown
    total = torch.zeros(4)
    for domain in ("prose", "poetry", "sums"):
        lines = (corpus / "held_out" / domain / "a.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        ids = [i for text in texts for i in [0, *tokenizer.encode(text), 1]]
        length = min(200, len(ids) - 1) // 24 * 24
        assert length > 48
        nats = 0.0
        with torch.no_grad():
            for start_of_row in range(0, length, 24):
                row = ids[start_of_row : start_of_row + 25]
                log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
                nats -= sum(float(log_probs[i, token]) for i, token in enumerate(row[1:]))
        text_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids[1 : length + 1] if i > 2)
        assert summary["held_out_loss"][domain] == pytest.approx(nats / length, rel=1e-5)
        bits = nats / math.log(2) / text_bytes
        assert summary["bits_per_byte"][domain] == pytest.approx(bits, rel=1e-5)
        assert shown[domain] == {"1": load[1].tolist()}
        total += load[1]
        load[1].zero_()
    router = summary["router"]["1"]
    assert router["max_violation"] == pytest.approx(float(total.max() / total.mean() - 1))
    assert router["dead_share"] == float((total == 0).double().mean())


def test_the_model_is_judged_on_what_its_trainer_held_out(
    config, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder without `train/` and `held_out/` only hashes tell them apart."""
    made = config(training={"steps": 1})
    data = made.data.model_copy(update={"source": corpus / "train"})
    made = made.model_copy(update={"data": data})
    run(made, tmp_path / "out")
    index = ShardIndex(
        tmp_path / "out" / "shards" / "train",
        json.loads((tmp_path / "out" / "shards" / "train" / "index.json").read_text()),
    )
    tokenizer = Tokenizer.load(tmp_path / "out")
    seen = {
        tokenizer.decode(index.document(domain_id, number).tolist())
        for domain_id, shard in enumerate(index.shards)
        for number in range(shard.documents)
    }
    assert len(seen) > 100
    text = labelled_text(corpus / "train", trained=[TrainedText.load(tmp_path / "out")])
    assert text.held_out == {"poetry": True, "prose": True, "sums": True}
    assert {document.text for document in text.documents}.isdisjoint(seen)
    line = ["specialize", str(tmp_path / "out"), "--json"]
    assert cli.run([*line, str(corpus / "train")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["held_out"] == text.held_out
    assert "nothing tells" not in captured.err
    assert cli.run([*line, str(corpus / "held_out")]) == 0
    captured = capsys.readouterr()
    assert not any(json.loads(captured.out)["held_out"].values())
    told = "nothing tells whether this text of poetry, prose, sums was trained on"
    assert told in captured.err


def test_the_model_remembers_the_length_of_its_rows(finished: Path) -> None:
    config = load_model(finished).config
    assert (config.trained_length, config.max_position_embeddings) == (24, 64)


@pytest.mark.parametrize("topk_method", list(ROUTERS))
def test_every_router_trains(topk_method: str, config, tmp_path: Path) -> None:
    model = {"topk_method": topk_method, **ROUTER_FIELDS.get(topk_method, {})}
    run(config(model=model, training={"steps": 2, "dtype": "float32"}), tmp_path)
    first, second = rows(tmp_path)
    assert first["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert second["loss"] < first["loss"]
    assert load_model(tmp_path).config.topk_method == topk_method
    if topk_method != "noaux_tc":
        with pytest.raises(ValueError, match="model type `moescope`"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    if topk_method == "relu":
        assert second["l1_weight"] / first["l1_weight"] == pytest.approx(1.2)
