"""All numbers of a station, held against the engine's: none may be missing, none may be added."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from reader import LANGUAGES, TEXT, set_slider, settle, token_ids, write
from spelled import bytes_of, count, number, numbers, percent

from moescope.api import Model
from moescope.catalog import BOX, catalog
from moescope.config import ModelConfig
from moescope.engine.sampling import SamplingParams
from moescope.model.costs import count_parameters
from moescope.scope.detail import Reading
from moescope.scope.history import History
from moescope.scope.reasoning import FILE as REASONING, ReasoningHistory
from moescope.scope.specialization import Specialization
from moescope.scope.steps import Candidate, read
from moescope.server.examples import question_form

pytestmark = [pytest.mark.slow, pytest.mark.page]

RATES = (68, 460, 3350, 8 * 4800)
"""Gigabytes a second of the machines that the station on services names."""
HOLDS = (32, 768, 80, 8 * 141)
"""Gigabytes of their memory."""
DEVOTED = 2
"""Even shares of an expert's work that a kind of text has if the page calls it devoted to it."""
SUM = "23+45"
POEM = "床前明月光，"


def reference() -> ModelConfig:
    return catalog()["deepseek-r1"].config


def station(page, name: str):
    section = page.get_by_test_id(f"station-{name}")
    section.scroll_into_view_if_needed()
    settle(page)
    return section


def selected(page) -> int:
    chips = page.get_by_test_id("token").all()
    return next(i for i, c in enumerate(chips) if c.get_attribute("aria-selected") == "true")


def prompt_ids(page) -> list[int]:
    chips = page.locator("[data-testid=token]:not(.made)").all()
    return [int(chip.get_attribute("data-token-id")) for chip in chips]


def layer_of(page) -> int:
    return int(page.get_by_test_id("layer").input_value())


# --- one check a station -------------------------------------------------------------------------


def check_language(page, engine: Model, _: str) -> None:
    told = numbers(station(page, "language"))
    assert told == {str(engine.config.num_hidden_layers)}


def check_steps(page, engine: Model, language: str) -> None:
    ids, index = token_ids(page), selected(page)
    step = read(engine.engine, ids)[index]
    found = Reading(engine.engine, ids).token(index, 0, SamplingParams())
    config, total = engine.config, count_parameters(engine.config).total
    section = station(page, "steps")
    assert numbers(section) == {
        *(number(n) for n in (step.id, config.hidden_size) if n < 1000),
        *(str(n) for n in (step.id, config.hidden_size)),
        str(config.num_hidden_layers),
        percent(step.parameters_used / total),
        number(config.vocab_size),
        percent(step.candidates[0].probability),
        number(config.max_position_embeddings),
        *(number(n) for n in (len(ids), len(ids) + 1)),
    }
    live = section.locator(".live").all_inner_texts()
    best = step.candidates[0]
    assert best.text.strip() in live[2] and percent(best.probability) in live[2]
    picked = next(c.text for c in found.candidates if c.id == found.picked)
    assert picked.strip() in live[3]


def check_relu(page, engine: Model, _: str) -> None:
    section = station(page, "relu")
    section.get_by_test_id("relu-relu").wait_for()
    ids, layer = token_ids(page), layer_of(page)
    expected = {str(layer + 1), str(engine.config.n_routed_experts)}
    for rule in ("softmax", "relu"):
        steps = read(engine.steer(rule=rule).engine, ids)
        asked = [len(step.layers[layer].topk_ids) for step in steps]
        told = section.get_by_test_id(f"relu-{rule}")
        mean = sum(asked) / len(asked)
        assert float(told.get_attribute("data-mean")) == pytest.approx(mean)
        low, high = min(asked), max(asked)
        assert numbers(told) == (
            {str(low)} if low == high else {number(mean, 1), str(low), str(high)}
        )
        expected |= numbers(told) | set(map(str, asked))
        bars = told.locator("xpath=following-sibling::*[1]").locator("text.number")
        assert [int(bar) for bar in bars.all_text_contents()] in ([], asked)
    assert numbers(section) <= expected


def check_fine(page, engine: Model, language: str) -> None:
    config = engine.config
    k, n = config.required("num_experts_per_tok"), config.required("n_routed_experts")
    own = {str(k), str(n), count(math.comb(n, k), language)}
    explained = {"16", "2", "4", "64", "8", "2024"}  # the paper's own example
    section = station(page, "fine")
    for place, cut in enumerate((1, 2, 4)):
        set_slider(page, "fine-cut", place)
        k, n = 2 * cut, 16 * cut
        ways = {str(k), str(n), count(math.comb(n, k), language)}
        assert numbers(section.get_by_test_id("fine-ways")) == ways
        assert numbers(section) == ways | own | explained


def check_context(page, engine: Model, language: str) -> None:
    section = station(page, "context")
    for power in (10, 17):
        set_slider(page, "context-tokens", power)
        expected: set[str] = set()
        for config in (reference(), engine.config):
            # DeepSeek-V2, table 1: a key and a value of each head, without the rotated part.
            head = config.required("qk_nope_head_dim") + config.required("v_head_dim")
            full = config.num_attention_heads * head
            kept = config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
            read = min(2**power, config.max_position_embeddings)
            full, kept = (2 * config.num_hidden_layers * read * n for n in (full, kept))
            expected |= {bytes_of(full), bytes_of(kept), percent(kept / full)}
            expected.add(number(config.max_position_embeddings))
        assert numbers(section) == expected


def check_service(page, engine: Model, language: str) -> None:
    ours, theirs = count_parameters(engine.config), count_parameters(reference())
    expected = {f"{number(amount)}GB" for amount in (*RATES, *HOLDS)}
    for total, active in (
        (theirs.total, theirs.active),
        (theirs.total, theirs.total),
        (ours.total, ours.active),
    ):
        expected |= {count(total, language), count(active, language)}
        for rate in RATES:
            speed = rate * 1e9 / active
            small = number(speed, 1 if speed < 10 else 0)
            expected.add(count(round(speed), language) if speed >= 100 else small)
    weights = round(theirs.total / 1e9)
    expected.add(f"{weights}GB")
    section = station(page, "service")
    assert numbers(section) == expected
    # What a machine cannot hold stands in brackets.
    for row, total in enumerate((theirs.total, theirs.total, ours.total)):
        cells = section.locator("tbody tr").nth(row).locator("td").all_inner_texts()
        assert ["(" in cell for cell in cells[-4:]] == [total > held * 1e9 for held in HOLDS]


def check_thinking(page, engine: Model, _: str) -> None:
    section = station(page, "thinking")
    section.get_by_test_id("question").fill(SUM)
    section.get_by_test_id("think").click()
    section.locator("ol[aria-busy=false]").wait_for(timeout=120_000)
    settle(page)
    form = question_form(engine.tokenizer)
    assert form is not None
    ids = engine.engine.encode(form.replace("{question}", f"{SUM}=?") + "<think>")
    made = [token.id for token in engine.stream(ids, max_tokens=256)]
    steps = [s for s in read(engine.engine, [*ids, *made]) if not s.special]
    end = [*ids, *made].index(engine.tokenizer.token_id("</think>"))
    parts = (
        [s for s in steps if s.index < len(ids)],
        [s for s in steps if len(ids) <= s.index < end],
        [s for s in steps if s.index > end],
    )
    for item, part in zip(section.locator("ol > li").all(), parts, strict=True):
        chips = "".join(item.locator(".chip").all_text_contents())
        assert [c for c in chips if c.isalnum()] == [c for s in part for c in s.text if c.isalnum()]
    answer = re.sub(r"\s", "", "".join(section.locator(".answer .chip").all_text_contents()))
    verdict = section.locator(".answer strong")
    right = re.sub(r"[^\d]", "", answer) == str(eval(SUM))
    assert ("✓" in verdict.inner_text()) == right
    assert right or str(eval(SUM)) in verdict.inner_text()
    layer = layer_of(page)
    heading = section.locator("h3")
    assert numbers(heading) == {str(layer + 1)}
    titles = section.locator("rect title").all_text_contents()
    experts = engine.config.required("n_routed_experts")
    assert len(titles) == 3 * experts
    for part, tokens in enumerate(parts):
        for expert, title in enumerate(titles[part * experts : (part + 1) * experts]):
            served = sum(expert in step.layers[layer].topk_ids for step in tokens)
            share = percent(served / max(1, len(tokens)))
            assert {*re.findall(r"[\d.]+%?", title)} == {str(expert), share}


def check_training(page, engine: Model, _: str) -> None:
    history = History.from_file(BOX / "tiny" / "training_history.json")
    layer = engine.config.first_k_dense_replace
    at = layer_of(page) - layer
    section = station(page, "training")
    section.get_by_test_id("drift").wait_for()
    for place in (0, len(history.snapshots) - 1):
        set_slider(page, "training-step", place)
        shot = history.snapshots[place]
        columns = list(zip(*(domain[at] for domain in shot.load), strict=True))
        focus = sum(map(max, columns)) / sum(map(sum, columns))
        drift = numbers(section.get_by_test_id("drift"))
        kinds = sum(any(map(any, domain)) for domain in shot.load)
        assert drift == {percent(focus), percent(1 / kinds), str(layer_of(page) + 1)}
        row = [r for r in history.rows if r.step <= shot.step][-1]
        reading = numbers(section.locator(".reading"))
        worst = max(row.max_violation.values())
        assert reading == {
            *(number(row.step), number(history.steps), number(row.loss)),
            number(worst),
        }
    ends = section.locator("text.end").all_text_contents()
    final = [row for row in history.rows if row.held_out][-1].held_out
    told = [found[0] for end in ends if (found := re.findall(r"([\d.]+)\s*$", end))]
    assert sorted(told) == sorted(number(loss, 1) for loss in final.values())
    last = history.snapshots[-1].load
    favourite = [0] * len(history.domains)
    for expert in range(len(last[0][at])):
        work = [domain[at][expert] for domain in last]
        favourite[work.index(max(work))] += 1
    groups = section.locator("svg text.soft:not(.tick)").all_text_contents()
    sizes = [int(found[0]) for text in groups if (found := re.findall(r"^\s*(\d+)\s", text))]
    assert sizes == [n for n in favourite if n]


def check_reasoning(page, engine: Model, _: str) -> None:
    history = ReasoningHistory.from_file(REASONING)
    section = station(page, "reasoning")
    section.get_by_test_id("reasoning-path").wait_for()
    for stage in history.stages:
        for box in section.get_by_test_id(f"reasoning-stage-{stage.name}").all():
            low, high = (stage.one.mean + side * (stage.one.half or 0) for side in (-1, 1))
            range_ = {percent(max(0, low)), percent(min(1, high))} if stage.one.half else set()
            shown = numbers(box) - {"16"}
            assert shown == {percent(stage.one.mean), percent(stage.any.mean), *range_}
    for run in history.runs:
        section.get_by_test_id(f"reasoning-run-{run.name}").click()
        for place in (0, len(run.snapshots) - 1):
            set_slider(page, "reasoning-step", place)
            snapshot = run.snapshots[place]
            right = sum(answer.reward >= 1 for answer in snapshot.answers)
            told = numbers(section.get_by_test_id("reasoning-told"))
            assert told == {str(snapshot.step), str(right), str(len(history.questions))}
            marks = section.get_by_test_id("reasoning-question").all_text_contents()
            assert marks.count("✓") == right and len(marks) == len(history.questions)
        question = section.get_by_test_id("reasoning-question").nth(5)
        question.click()
        asked = [q.text for q in history.questions].index(question.get_attribute("title"))
        items = section.get_by_test_id("reasoning-answers").locator("> li").all()
        for item, snapshot in zip(items, run.snapshots, strict=True):
            answer = snapshot.answers[asked]
            said = re.sub(r"</?think>", " ", answer.text).split()
            assert re.sub(r"[·→✓✗]", " ", item.locator(".text").inner_text()).split() == said
            assert ("✓" in item.inner_text()) == (answer.reward >= 1)
            assert str(answer.tokens) in item.inner_text()


def check_whatif(page, engine: Model, language: str) -> None:
    section = station(page, "whatif")
    found = Specialization.from_file(BOX / "tiny" / "specialization.json")
    for domain in found.domains:
        button = section.get_by_test_id(f"off-{domain}")
        own = len(devoted(found, domain))
        assert numbers(button) == {str(own)} if own else button.count() == 0
    assert numbers(section.locator(".devoted")) == {
        percent(DEVOTED / len(found.domains)),
        str(len(found.domains)),
    }
    section.get_by_test_id("off-arithmetic").click()
    section.locator("[data-testid=proof][aria-busy=false][data-after]").wait_for(timeout=120_000)
    off = devoted(found, "arithmetic")
    assert numbers(page.get_by_test_id("whatif-note")) == {str(len(off))}
    models = [engine, engine.steer(disabled=off)]
    check_proof(section, models)
    section.get_by_test_id("write-both").click()
    section.get_by_test_id("whatif-verdict").wait_for(timeout=120_000)
    settle(page)
    check_continued(section, models, prompt_ids(page))
    section.get_by_test_id("off-arithmetic").click()  # other stations show the model as it is
    settle(page)


def devoted(found: Specialization, domain: str) -> list[tuple[int, int]]:
    """The experts that work on one domain most, and by more than the share that the page names."""
    at, experts = found.domains.index(domain), []
    for place, layer in enumerate(found.layers):
        for expert, mine in enumerate(found.load[at][place]):
            work = [load[place][expert] for load in found.load]
            if mine == max(work) and len(work) * mine > DEVOTED * sum(work):
                experts.append((layer, expert))
    return experts


def check_proof(section, models: list[Model]) -> None:
    """Six sums and a poem, as each model continues them."""
    proof = section.get_by_test_id("proof")
    sums, poems = (proof.locator(".row").nth(place).locator("> :not(.soft)") for place in (1, 2))
    form = question_form(models[0].tokenizer)
    assert form is not None
    for side, model in enumerate(models):
        shown = sums.nth(side).locator("li").all_inner_texts()
        right = 0
        for text in shown:
            asked, _, told = text.partition(" = ")
            said = written(model, form.replace("{question}", f"{asked}=?"), 72).strip()
            found = re.findall(r"-?\d+", said)
            answer = found[-1] if found else said[:20] + "…" * (len(said) > 20)
            is_right = bool(found) and int(answer) == eval(asked)
            assert told.split() == [*answer.split(), "✓" if is_right else "✗"], text
            right += is_right
        verdict = numbers(sums.nth(side).locator("strong"))
        assert len(shown) == 6 and verdict == {str(right), "6"}
        assert poems.nth(side).inner_text().split() == (POEM + written(model, POEM, 28)).split()


def written(model: Model, prompt: str, max_tokens: int) -> str:
    """What a model writes, without its thought."""
    made = [token.id for token in model.stream(prompt, max_tokens=max_tokens)]
    end = model.tokenizer.token_id("</think>")
    said = made[made.index(end) + 1 :] if end in made else made
    return model.tokenizer.decode([i for i in said if i not in model.tokenizer.special_ids])


def check_continued(section, models: list[Model], prompt: list[int]) -> None:
    """The same beginning continued by both, and their guesses where they part."""
    texts = [
        [*prompt, *(token.id for token in model.stream(prompt, max_tokens=24))] for model in models
    ]
    for side, ids in zip(("before", "after"), texts, strict=True):
        tokens = section.get_by_test_id(f"whatif-{side}").locator("[data-token-id]").all()
        shown = [int(token.get_attribute("data-token-id")) for token in tokens]
        assert shown == ids[max(0, len(prompt) - 10) :]
    pairs = enumerate(zip(*texts, strict=False))
    parting = next((i for i, (one, other) in pairs if one != other), min(map(len, texts)))
    differ = texts[0] != texts[1]
    verdict = numbers(section.get_by_test_id("whatif-verdict"))
    assert verdict == ({str(parting - len(prompt) + 1)} if differ else set())
    place = (parting if differ else len(prompt)) - 1
    guesses = [
        read(model.engine, ids)[place].candidates for model, ids in zip(models, texts, strict=True)
    ]
    rows = section.get_by_test_id("changed").all()
    listed = {int(row.get_attribute("data-token-id")) for row in rows}
    assert {side[0].id for side in guesses} <= listed
    for row in rows:
        token = int(row.get_attribute("data-token-id"))
        told = " → ".join(guess_of(token, side) for side in guesses)
        assert row.locator(".number").text_content().strip() == told


def guess_of(token: int, candidates: list[Candidate]) -> str:
    """A token's probability; where it is not among the likeliest, that it is below theirs."""
    mine = [c.probability for c in candidates if c.id == token]
    shown, below = (mine[0], False) if mine else (candidates[-1].probability, True)
    least = shown < 1e-4
    return "< " * below + "< " * least + percent(max(shown, 1e-4))


CHECKS: dict[str, Callable[[Any, Model, str], None]] = {
    "language": check_language,
    "steps": check_steps,
    "relu": check_relu,
    "fine": check_fine,
    "context": check_context,
    "service": check_service,
    "thinking": check_thinking,
    "training": check_training,
    "reasoning": check_reasoning,
    "whatif": check_whatif,
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_number_is_the_engines(open_page, engine: Model, language: str) -> None:
    page = open_page(f"lang={language}&max=12")
    write(page, TEXT[language])
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    for check in CHECKS.values():
        check(page, engine, language)


# --- and each check can fail ---------------------------------------------------------------------


def spoil_start(change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[Any], None]]:
    """Let the first answer be of another model."""

    def answer(route) -> None:
        told = route.fetch().json()
        change(told["model"])
        route.fulfill(json=told)

    return {"**/api/start/en": answer}


def spoil(path: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[Any], None]]:
    """Change one answer."""

    def answer(route) -> None:
        told = route.fetch().json()
        change(told)
        route.fulfill(json=told)

    return {f"**/api/{path}": answer}


def spoil_stream(change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[Any], None]]:
    """Change every token of a stream."""

    def answer(route) -> None:
        response = route.fetch()
        events = [json.loads(line[6:]) for line in response.text().splitlines() if line]
        for event in events:
            if event["type"] == "token":
                change(event["step"])
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(body=body, headers={"content-type": "text/event-stream"})

    return {"**/api/generate": answer}


def one_more(name: str, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(told: Any) -> None:
        for step in path:
            told = told[step]
        told[name] *= 1.2 if isinstance(told[name], float) else 2

    return change


def another_expert(step: dict[str, Any]) -> None:
    for layer in filter(None, step["layers"]):
        layer["topk_ids"] = [(expert + 1) % 64 for expert in layer["topk_ids"]]


def fewer_experts(told: dict[str, Any]) -> None:
    for step in told["steps"]:
        for layer in filter(None, step["layers"]):
            del layer["topk_ids"][:1], layer["topk_weights"][:1]


def other_answers(told: dict[str, Any]) -> None:
    told["runs"][0]["snapshots"][0]["answers"].reverse()


def other_digits(step: dict[str, Any]) -> None:
    if not step["in_prompt"]:
        step["text"] = step["text"].translate(str.maketrans("0123456789", "1234567890"))


WRONG = [
    ("language", spoil_start(lambda model: model["layers"].append(model["layers"][-1])), None),
    ("steps", spoil_start(one_more("hidden_size")), None),
    ("relu", spoil("trace", fewer_experts), None),
    ("fine", spoil_start(one_more("num_experts_per_tok")), None),
    ("context", spoil_start(one_more("kept", "cache")), None),
    ("service", spoil_start(one_more("active", "parameters")), None),
    ("thinking", spoil_stream(another_expert), None),
    ("reasoning", spoil("reasoning", other_answers), None),
    ("training", spoil("training", lambda told: [one_more("loss")(r) for r in told["rows"]]), None),
    ("whatif", spoil_stream(other_digits), r"\d\+\d+ = \d+ "),
    ("whatif", spoil_stream(one_more("probability", "candidates", 0)), "% → "),
]
"""A check, an answer with a wrong number, and what the check that notices says."""


@pytest.mark.parametrize(("name", "routes", "told"), WRONG)
def test_a_wrong_number_is_noticed(
    open_page, engine: Model, name: str, routes: dict[str, Callable[[Any], None]], told: str | None
) -> None:
    page = open_page("lang=en&max=2", routes=routes)
    page.get_by_test_id("prompt").fill("The moon")
    page.get_by_test_id("reset").click()
    settle(page)
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    with pytest.raises(AssertionError, match=told):
        CHECKS[name](page, engine, "en")


def test_every_check_has_a_wrong_number() -> None:
    assert {name for name, *_ in WRONG} == CHECKS.keys()
