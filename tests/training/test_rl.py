"""Reinforcement: the formulas by hand in float64, the sampler's routing, and that it learns."""

import json
import math
from pathlib import Path

import pytest
import torch
from small import rows, write_config
from test_sft import small_model, start, talker  # noqa: F401

from moescope.checkpoint import load_model
from moescope.cli import main as cli
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.model.routing import ROUTERS
from moescope.model.steering import moe_layers
from moescope.text.tokenizer import Tokenizer
from moescope.training.rl.objective import divergence, group_advantages, policy_loss
from moescope.training.rl.replay import Disagreement, joined, replaying
from moescope.training.rl.sampler import draw_answers, sampling_network

TASK = """
from moescope.training.rl.tasks import Problem

def sample(rng):
    question = rng.choice(["one?", "two?", "three?"])
    return Problem(question, lambda text: text.count("e") / max(len(text), 1))
"""


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    grpo, dr_grpo = (group_advantages(rewards, kind) for kind in ("grpo", "dr_grpo"))
    deviation = math.sqrt((1.5**2 + 3 * 0.5**2) / 4)
    torch.testing.assert_close(
        grpo[0], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64) / 1.000002
    )
    wanted = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(grpo[1], wanted / (deviation + 1e-6))
    torch.testing.assert_close(dr_grpo[1], wanted)
    assert not group_advantages(torch.full((1, 4), 0.7), "grpo").any()


@pytest.mark.parametrize("normalisation", ["grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("seed", range(4))
def test_the_objective_is_the_papers(normalisation: str, seed: int) -> None:
    """DeepSeekMath, eq. 3 without its last term; Dr.GRPO, section 3; GSPO, eq. 5-7."""
    torch.manual_seed(seed)
    rows_, seq, low, high, most = 5, 9, 0.1, 0.3, 12
    new = torch.randn(rows_, seq, dtype=torch.float64) * 0.5 - 2
    old = new + torch.randn(rows_, seq, dtype=torch.float64) * 0.3
    advantages = torch.randn(rows_, dtype=torch.float64)
    made = torch.rand(rows_, seq) < 0.6
    made[:, 0] = True
    loss, held_back = policy_loss(
        new, old, advantages, made,
        normalisation=normalisation, clip_low=low, clip_high=high, max_tokens=most,  # type: ignore[arg-type]
    )  # fmt: skip
    total, held, counted = 0.0, 0, 0
    for i in range(rows_):
        tokens = [t for t in range(seq) if made[i, t]]
        ratios = [math.exp(float(new[i, t] - old[i, t])) for t in tokens]
        if normalisation == "gspo":
            ratios = [math.prod(ratios) ** (1 / len(tokens))]
        a = float(advantages[i])
        worths = [min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in ratios]
        held += sum(w < r * a - 1e-12 for w, r in zip(worths, ratios, strict=True))
        counted += len(ratios)
        total += sum(worths) / {"grpo": len(tokens), "dr_grpo": most, "gspo": 1}[normalisation]
    assert float(loss) == pytest.approx(-total, rel=1e-12)
    assert float(held_back) == pytest.approx(held / counted)


def test_the_gradient_at_the_start_is_reinforce() -> None:
    """With a ratio of one, eq. 3 has the gradient of the mean of `A * log p` (eq. 20-21)."""
    new = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    made = torch.ones(3, 4, dtype=torch.bool)
    loss, _ = policy_loss(
        new, new.detach(), advantages, made,
        normalisation="grpo", clip_low=0.2, clip_high=0.2, max_tokens=4,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(new.grad, -(advantages[:, None] / 4).expand(3, 4))


def test_the_divergence_by_hand_and_never_negative() -> None:
    torch.manual_seed(0)
    new = torch.randn(4, 6, dtype=torch.float64)
    reference = torch.randn(4, 6, dtype=torch.float64)
    made = torch.rand(4, 6) < 0.5
    made[:, 0] = True
    wanted = 0.0
    for i in range(4):
        terms = [
            math.exp(float(reference[i, t] - new[i, t])) - float(reference[i, t] - new[i, t]) - 1
            for t in range(6)
            if made[i, t]
        ]
        assert min(terms) >= 0
        wanted += sum(terms) / len(terms)
    assert float(divergence(new, reference, made)) == pytest.approx(wanted, rel=1e-12)


@pytest.fixture
def model() -> CausalLM:
    made = CausalLM(read_config(small_model(), "small")).eval()
    initialise(made, 3)
    return made


@pytest.mark.parametrize("sampler", ["live", "int8"])
def test_answers_come_with_the_probabilities_and_experts_of_who_drew_them(
    model: CausalLM,
    talker: Tokenizer,  # noqa: F811
    sampler: str,
) -> None:
    network = sampling_network(model, sampler, torch.float32)  # type: ignore[arg-type]
    prompts = [[0, 7, 8], [0, 9], [0, 10, 11, 12, 13]]
    answers = draw_answers(network, talker, prompts, [5, 6, 7], max_tokens=10)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.prompt) == prompt
        ids = torch.tensor([[*answer.prompt, *answer.ids]])
        hidden = model(ids[:, :-1])
        logprobs = model.logits(hidden)[0].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        tolerance = 1e-4 if sampler == "live" else 0.05
        torch.testing.assert_close(chosen, torch.tensor(answer.logprobs), rtol=0, atol=tolerance)
        for layer in moe_layers(model):
            assert answer.choices[layer].shape == (ids.shape[1] - 1, 2)
    again = draw_answers(network, talker, prompts[1:2], [6], max_tokens=10)
    assert again[0].ids == answers[1].ids  # whatever stands beside it


def test_without_replay_choices_differ_and_with_it_they_do_not(
    model: CausalLM,
    talker: Tokenizer,  # noqa: F811
) -> None:
    """The sampler's network is another; replayed, its experts are used, and the router learns."""
    other = CausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    for moe in moe_layers(other).values():
        moe.gate.weight.data += torch.randn_like(moe.gate.weight) * 0.02
    answers = draw_answers(other, talker, [[0, 7, 8], [0, 9]], [1, 2], max_tokens=20)
    longest = max(len(a.prompt) + len(a.ids) for a in answers)
    choices = joined([a.choices for a in answers], longest - 1)
    ids = torch.full((2, longest), 2)
    read = torch.zeros(2, longest - 1, dtype=torch.bool)
    for row, answer in enumerate(answers):
        whole = [*answer.prompt, *answer.ids]
        ids[row, : len(whole)] = torch.tensor(whole)
        read[row, : len(whole) - 1] = True
    apart = Disagreement(model, choices, read)
    model(ids[:, :-1], recorder=apart)
    assert apart.differing > 0
    assert apart.slots == int(read.sum()) * 2 * len(choices)

    class Used(Disagreement):
        def routing(self, layer_idx: int, routing: object) -> None:
            used = routing.topk_ids[self._read]  # type: ignore[attr-defined]
            self.differing += int((used != self._choices[layer_idx][self._read]).sum())

    used = Used(model, choices, read)
    gates = {layer: moe.gate for layer, moe in moe_layers(model).items()}
    with replaying(model, choices):
        hidden = model(ids[:, :-1], recorder=used)
    assert used.differing == 0
    assert {layer: moe.gate for layer, moe in moe_layers(model).items()} == gates
    hidden.square().sum().backward()
    assert all(gate.weight.grad is not None and gate.weight.grad.any() for gate in gates.values())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rule", [*ROUTERS, "softmax_after_topk"])
def test_replay_of_the_own_choices_changes_nothing(
    rule: str,
    normed: bool,
    model: CausalLM,
    talker: Tokenizer,  # noqa: F811
) -> None:
    fields: dict[str, object] = {"topk_method": rule, "n_group": 2, "topk_group": 1}
    if rule == "softmax_after_topk":
        fields = {"topk_method": "greedy", "scoring_func": "softmax", rule: True}
    model = CausalLM(model.config.model_copy(update=fields | {"norm_topk_prob": normed})).eval()
    initialise(model, 3)
    (answer,) = draw_answers(model, talker, [[0, 7, 8]], [1], max_tokens=12)
    ids = torch.tensor([[*answer.prompt, *answer.ids]])[:, :-1]
    plain = model(ids)
    with replaying(model, joined([answer.choices], ids.shape[1])):
        replayed = model(ids)
    torch.testing.assert_close(plain, replayed, rtol=1e-5, atol=1e-6)


def rl_config(folder: Path, **rl: object) -> Path:
    """Write the config of a small reinforcement, and its task."""
    (folder / "task.py").write_text(TASK)
    training = {
        **{"steps": 12, "batch_size": 32, "micro_batch_size": 16, "dtype": "float32"},
        **{"optimizer": "adamw", "adamw_learning_rate": 0.02, "weight_decay": 0.0},
        **{"decay_fraction": 0.0},
    }
    config = write_config(folder / "c.toml", training=training)
    text = config.read_text()
    table = {"tasks": [str(folder / "task.py")], "max_tokens": 12, "asked": 8, **rl}
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    text = text[text.index("[data]") :] + "\n".join(["[rl]", *lines, ""])
    config.write_text('kind = "rl"\n' + text)
    return config


@pytest.mark.parametrize(
    "switches",
    [
        {"sampler": "live", "replay": False, "normalisation": "dr_grpo"},
        {"sampler": "int8", "replay": True, "normalisation": "grpo", "kl": 0.001},
        {"sampler": "int8", "replay": True, "normalisation": "gspo", "epochs": 2},
    ],
)
def test_reward_rises_on_an_easy_task(
    start: Path,  # noqa: F811
    tmp_path: Path,
    switches: dict[str, object],
) -> None:
    out = tmp_path / "out"
    config = rl_config(tmp_path, **switches)
    assert cli.run(["train", str(config), "--start-from", str(start), "--out", str(out)]) == 0
    logged = rows(out)
    rewards = [row["reward"] for row in logged]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 * 1.5
    first = logged[0]
    # Of int8 weights and a bf16 cache; with two epochs of the first move of the weights, too.
    assert first["differing_share"] < 0.3
    assert 0 < first["largest_probability_difference"] < 0.2 or switches["sampler"] == "live"
    assert (out / "answers.jsonl").exists()


def test_a_killed_reinforcement_goes_on_bit_for_bit(start: Path, tmp_path: Path) -> None:  # noqa: F811
    config = rl_config(tmp_path)
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out, more in ((whole, []), (again, []), (again, ["--from-step", "4"])):
        arguments = ["train", str(config), "--start-from", str(start), "--steps", "5"]
        arguments += ["--checkpoint-every", "2", "--out", str(out), *more]
        assert cli.run(arguments) == 0
    assert rows(whole) == rows(again)
    ours, theirs = (load_model(folder).state_dict() for folder in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_task_that_is_none_is_named(
    start: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = rl_config(tmp_path)
    arguments = ["train", str(config), "--start-from", str(start), "--out", str(tmp_path / "x")]
    (tmp_path / "task.py").write_text("answer = 42\n")
    assert cli.run(arguments) == 2
    assert "has no function sample(rng)" in capsys.readouterr().err
    (tmp_path / "task.py").unlink()
    assert cli.run(arguments) == 2
    assert "task.py, but there is no such Python file" in capsys.readouterr().err
