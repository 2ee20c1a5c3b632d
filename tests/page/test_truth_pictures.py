"""Numbers of the stations that show one token, and of those beside other models: the engine's."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from reader import LANGUAGES, TEXT, settle, token_ids, write
from spelled import NUMBER, count, number, numbers, percent

import moescope
from moescope.api import Model
from moescope.catalog import BOX, catalog
from moescope.engine.sampling import SamplingParams
from moescope.lab.beside import beside
from moescope.model.costs import count_parameters, kept_numbers, plain_numbers
from moescope.scope.detail import Reading, TokenDetail
from moescope.scope.history import History
from moescope.scope.resampling import Interval
from moescope.scope.specialization import Specialization
from moescope.scope.steps import TokenStep, read
from moescope.scope.twin_study import AT_EQUAL_TOKENS, FILE as TWINS, RUNS, TwinRun, TwinStudy
from moescope.text.deepseek_vocabulary import deepseek_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.page]


def station(page, name: str):
    section = page.get_by_test_id(f"station-{name}")
    section.scroll_into_view_if_needed()
    settle(page)
    return section


class Known:
    """What the engine says of what the page shows."""

    def __init__(self, page, engine: Model, language: str) -> None:
        chips = page.get_by_test_id("token").all()
        self.index = next(
            i for i, c in enumerate(chips) if c.get_attribute("aria-selected") == "true"
        )
        self.layer = int(page.get_by_test_id("layer").input_value())
        self.ids, self.engine, self.language = token_ids(page), engine, language
        self.config, self.counted = engine.config, count_parameters(engine.config)
        self.k = self.config.required("num_experts_per_tok")
        self.n = self.config.required("n_routed_experts")
        self.steps: list[TokenStep] = read(engine.engine, self.ids)
        self.step = self.steps[self.index]
        reading = Reading(engine.engine, self.ids)
        self.detail: TokenDetail = reading.token(self.index, self.layer, SamplingParams())

    def count(self, value: float) -> str:
        return count(value, self.language)

    @property
    def share(self) -> set[str]:
        """How much of the model is at work on the token, and of DeepSeek-R1."""
        theirs = count_parameters(catalog()["deepseek-r1"].config)
        pairs = (
            (self.step.parameters_used, self.counted.total),
            (theirs.active, theirs.total),
        )
        return {
            told
            for used, total in pairs
            for told in (percent(used / total), self.count(used), self.count(total))
        }

    @property
    def spelled(self) -> set[str]:
        """Numbers in what tokens spell, and in their bytes."""
        texts = [*(s.text for s in self.steps), *(c.text for c in self.detail.candidates)]
        texts += [guess.text for layer in self.detail.lens for guess in layer]
        texts += [c.text for c in self.step.candidates]
        texts += [near.text for near in self.detail.neighbours]
        return set(NUMBER.findall(" ".join([*texts, *(f"{byte:02X}" for byte in range(256))])))


def layers(known: Known) -> set[str]:
    return {str(layer + 1) for layer in range(known.config.num_hidden_layers)}


def leaves(told: set[str], *expected: Iterable[str]) -> set[str]:
    """Numbers that are told and that the engine does not know."""
    return told - set().union(*expected)


# --- one check a station -------------------------------------------------------------------------


def check_prompt(page, known: Known) -> None:
    assert numbers(station(page, "prompt").get_by_test_id("counter")) == known.share


def check_flow(page, known: Known) -> None:
    section = station(page, "flow")
    told = numbers(section)
    routed = [layer for layer in known.step.layers if layer is not None]
    now = known.step.layers[known.layer]
    assert now is not None
    ids = {str(layer.topk_ids[0]) for layer in routed} | {str(i) for i in now.topk_ids}
    seen = {percent(weight) for weight in known.detail.attention.mean}
    guesses = {percent(c.probability) for c in known.step.candidates}
    assert not leaves(told, ids, seen, guesses, layers(known), known.spelled)
    chosen = section.get_by_role("list").locator("li button").all_inner_texts()
    assert len(chosen) == len(now.topk_ids)
    for text, expert, weight in zip(chosen, now.topk_ids, now.topk_weights, strict=True):
        assert text.split()[0] == str(expert) and text.split()[-1] == number(weight)
    assert ids <= told and percent(known.step.candidates[0].probability) in told


def check_tokens(page, known: Known) -> None:
    section = station(page, "tokens")
    section.get_by_test_id("cut-reference").wait_for()
    own = [step for step in known.steps if not step.special]
    text = b"".join(bytes(step.bytes) for step in own).decode()
    tokenizer = deepseek_tokenizer()
    assert tokenizer is not None
    theirs = tokenizer.encode(text)
    expected = {
        *(str(step.id) for step in known.steps),
        *(number(n) for n in (len(text), len(text.encode()), len(own), len(theirs))),
        *(number(len(text) / n) for n in (len(own), len(theirs))),
        *(number(n) for n in (known.config.vocab_size, 129_280, 102_400)),
        *(number(near.similarity) for near in known.detail.neighbours),
        *(str(known.config.hidden_size), "0", "1"),
    }
    told = numbers(section)
    assert not leaves(told, expected, known.spelled)
    assert {number(near.similarity) for near in known.detail.neighbours} <= told
    assert str(known.step.id) in told


def check_attention(page, known: Known) -> None:
    attention = known.detail.attention
    kept, full = kept_numbers(known.config), plain_numbers(known.config)
    cache = {str(kept), str(full), percent(kept / full)}
    heads = {str(head + 1) for head in range(len(attention.heads))}
    seen = {percent(weight) for weight in attention.mean}
    told = numbers(station(page, "attention"))
    assert not leaves(told, cache, heads, seen, known.spelled)
    assert cache | heads <= told and percent(max(attention.mean)) in told


def check_router(page, known: Known) -> None:
    router = known.detail.router
    assert router is not None
    section = station(page, "router")
    offset = sum(router.bias) / len(router.bias)
    first, whole = router.topk_ids[0], sum(router.topk_weights)
    reading = numbers(section.locator(".reading"))
    bias = router.bias[first] - offset
    assert reading == {
        str(first),
        *(number(x, 2) for x in [router.logits[first]] if x >= 0),  # a minus hides a number here
        *(number(x, 3) for x in [bias] if x >= 0),
        *(number(x, 3) for x in (router.scores[first], router.scores[first] + bias)),
        number(router.topk_weights[0], 3),
    }
    shares = {percent(weight / whole) for weight in router.topk_weights}
    guesses = {percent(c.probability) for c in known.detail.candidates}
    ids = {str(expert) for expert in router.topk_ids}
    told = numbers(section)
    assert not leaves(told, reading, shares, guesses, ids, known.spelled, {str(known.k)})
    assert percent(router.topk_weights[0] / whole) in told


def check_experts(page, known: Known) -> None:
    section = station(page, "experts")
    section.get_by_test_id("expert-inside").scroll_into_view_if_needed()
    settle(page)
    router = known.detail.router
    assert router is not None
    found = Specialization.from_file(BOX / "tiny" / "specialization.json")
    opened, at = router.topk_ids[0], found.layers.index(known.layer)
    domains = {percent(load[at][opened]) for load in found.load}
    told = numbers(section)
    width = known.config.required("moe_intermediate_size")
    expected = {
        *map(str, (known.k, known.n, known.config.n_shared_experts)),
        *(percent(known.k / known.n), percent(1 / known.n), number(router.topk_weights[0], 3)),
        *map(str, (known.layer + 1, width, known.config.hidden_size)),
        *map(str, range(known.n)),
    }
    assert not leaves(told, expected, domains, known.spelled)
    assert domains <= told and percent(known.k / known.n) in told


def check_merge(page, known: Known) -> None:
    merge = known.detail.merge
    assert merge is not None
    parts = merge.contributions
    shared = next(part for part in parts if part.expert is None).projection / merge.output_norm
    expected = {
        *(f"{abs(part.projection):,.2f}".replace(",", "") for part in parts),
        *(f"{part.weight:.2f}" for part in parts if part.expert is not None),
        *(str(part.expert) for part in parts if part.expert is not None),
        f"{merge.output_norm:.2f}",
        *(f"{length:.2f}" for length in (merge.residual_norm_before, merge.residual_norm_after)),
    }
    told = numbers(station(page, "merge"))
    split = {percent(shared), percent(1 - shared)}
    assert numbers(page.get_by_test_id("shared-share")) == split
    assert told == expected


def check_next(page, known: Known) -> None:
    section = station(page, "next")
    guesses = {percent(c.probability) for c in known.detail.candidates}
    lens = {percent(g.probability) for layer in known.detail.lens for g in layer}
    firsts = [layer[0].id for layer in known.detail.lens]
    settled = len(firsts) - 1
    while settled and firsts[settled - 1] == firsts[-1]:
        settled -= 1
    told = numbers(section)
    # Beside the pick stand the limits of what the sliders say: none of them are told here.
    more = numbers(section.locator("details:not([data-testid=save-menu])"))
    assert not leaves(told - more, guesses, lens, layers(known), known.spelled)
    assert percent(known.detail.candidates[0].probability) in told
    if settled:
        sentence = numbers(section.locator("h3 + p").first)
        assert str(settled + 1) in sentence


def check_balance(page, known: Known) -> None:
    section = station(page, "balance")
    section.get_by_test_id("balance-copy").wait_for()
    expected = {"2", "0", "1"}  # what is called overloaded; what 0 and 1 would mean
    largest = 0.0
    for name, folder in (("own", "tiny"), ("copy", "tiny-unbalanced")):
        load = Specialization.from_file(BOX / folder / "specialization.json").load[0]
        times = [[share * len(layer) / sum(layer) for share in layer] for layer in load]
        over = [max(layer) - 1 for layer in times]
        every = [share for layer in times for share in layer]
        largest = max(largest, *every)
        own = {
            number(sum(over) / len(over)),
            percent(sum(share > 2 for share in every) / len(every)),
            percent(sum(share == 0 for share in every) / len(every)),
        }
        shown = section.get_by_test_id(f"balance-{name}").locator("dd").all_inner_texts()
        assert set(shown) == own, name
        expected |= own | {number(surplus, 1) for surplus in over}
        history = json.loads((BOX / folder / "training_history.json").read_text())
        expected.add(number(history["rows"][-1]["step"]))
    found = Specialization.from_file(BOX / "tiny" / "specialization.json")
    expected |= {number(bits) for bits in found.mutual_information}
    expected |= {number(largest, 1), number(largest / 3, 1)}
    assert not leaves(numbers(section), expected, layers(known))


def check_dense(page, known: Known) -> None:
    section = station(page, "dense")
    section.get_by_test_id("dense-moe").click()
    section.get_by_test_id("dense-text").wait_for(timeout=120_000)
    settle(page)
    source = (BOX.parents[2] / "web/src/stations/dense/passages.ts").read_text()
    passage = re.search(rf"{known.language}: `([^`]*)`", source)
    assert passage is not None
    ids = known.engine.engine.encode(passage[1])
    twin = moescope.load(BOX / "tiny-dense").engine
    ours, theirs = beside({"tiny": known.engine.engine, "dense": twin}, ids)
    wins = sum(a < b for a, b in zip(ours.losses, theirs.losses, strict=True))
    times = section.locator("[data-measure=time]").all()
    expected = {
        *(number(float(t.get_attribute("data-value")), 1) for t in times),
        *(number(sum(one.losses) / len(one.losses)) for one in (ours, theirs)),
        *(f"{number(one.bytes_per_token / 1e6, 1)}MB" for one in (ours, theirs)),
        *map(str, (len(ids), 60, wins, len(ours.losses))),
        known.count(ours.parameters.total / 100),
    }
    for one in (ours, theirs):
        total, active = one.parameters.total, one.parameters.active
        expected |= {known.count(total), known.count(active), percent(active / total)}
        expected.add(known.count(one.flops_per_token))
    held_out: set[str] = set()
    steps: set[str] = set()
    for name in ("tiny", "tiny-dense"):
        history = History.from_file(BOX / name / "training_history.json")
        held_out |= {number(loss) for loss in history.last_held_out.values()}
        steps.add(number(history.rows[-1].step))
    note = section.get_by_test_id("dense-steps")
    assert note.count() == (len(steps) > 1)
    if len(steps) > 1:
        assert numbers(note) == steps
        expected |= steps
    assert numbers(section.get_by_test_id("dense-held-out")) == held_out
    if TWINS.exists():
        expected |= study_numbers(page, TwinStudy.from_file(TWINS), known.language)
    else:
        expected.add(number(ours.parameters.total / ours.parameters.active, 1))
    told = numbers(section)
    assert told - set(NUMBER.findall(passage[1])) == expected | held_out
    assert section.get_by_test_id("no-large").count() == (not TWINS.exists())


def study_numbers(page, study: TwinStudy, language: str) -> set[str]:
    """All numbers of a study's picture, each held to where it stands."""
    picture = page.get_by_test_id("dense-study")
    mixture, _, total = study.runs[:3]
    expected = {count(n, language) for n in (mixture.parameters, mixture.active, total.parameters)}
    expected |= {str(len(mixture.held_out)), "95%"}

    def amount(run: TwinRun) -> set[str]:
        minutes = number(run.seconds / 60, 1 if run.seconds < 600 else 0)
        return {count(run.tokens, language), minutes}

    def loss(run: TwinRun) -> str:
        return number(sum(run.held_out.values()) / len(run.held_out), 3)

    words = {
        "en": ("The mixture is better", "The dense model is better", "Undecided"),
        "zh": ("混合专家好", "稠密模型好", "分不出高下"),
    }[language]
    for run in study.runs[1:]:
        lead = run.lead
        assert lead is not None
        verdict = picture.get_by_test_id(f"dense-verdict-{run.name}")
        own = amount(run) | {loss(run), loss(mixture), number(abs(lead.value), 3)}
        assert numbers(verdict) == own, run.name
        said = words[0 if lead.low > 0 else 1 if lead.high < 0 else 2]
        assert verdict.locator("strong").inner_text().startswith(said)
        expected |= own
        drawn = picture.get_by_test_id(f"dense-run-{run.name}")
        assert float(drawn.get_attribute("data-lead")) == lead.value
        zero = float(drawn.locator("xpath=..").locator(".zero").get_attribute("x1"))
        line, dot = drawn.locator(".interval"), drawn.locator("circle")
        ends = [float(line.get_attribute(end)) - zero for end in ("x1", "x2")]
        middle = float(dot.get_attribute("cx")) - zero
        scale = max(ends, key=abs) / max(lead.low, lead.high, key=abs)
        assert [*ends, middle] == pytest.approx(
            [scale * n for n in (lead.low, lead.high, lead.value)], abs=0.5
        )
    table = picture.locator("details")
    table.evaluate("(more) => { more.open = true }")
    cells = [number(run.held_out[d], 3) for d in mixture.held_out for run in study.runs]
    assert [
        NUMBER.findall(cell)[-1] for cell in table.locator("tbody td").all_inner_texts()
    ] == cells
    expected |= {*cells, count(mixture.tokens, language)}
    if len(study.runs) > 3:  # the mixture's minutes head those that were trained as long
        expected |= amount(mixture)
    expected.add(number(total.tokens / total.parameters, 2))
    assert numbers(picture) == expected
    return expected


def check_summary(page, known: Known) -> None:
    total, active = known.counted.total, known.counted.active
    assert numbers(station(page, "summary")) == {
        *(known.count(total), known.count(active), percent(active / total)),
        *(number(total / active, 1), str(known.k), str(known.n)),
    }


CHECKS: dict[str, Callable[[Any, Known], None]] = {
    "prompt": check_prompt,
    "flow": check_flow,
    "tokens": check_tokens,
    "attention": check_attention,
    "router": check_router,
    "experts": check_experts,
    "merge": check_merge,
    "next": check_next,
    "balance": check_balance,
    "dense": check_dense,
    "summary": check_summary,
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_number_is_the_engines(open_page, engine: Model, language: str) -> None:
    page = open_page(f"lang={language}&max=8")
    write(page, TEXT[language])
    page.get_by_test_id("token").nth(4).click()
    settle(page)
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    known = Known(page, engine, language)
    for check in CHECKS.values():
        check(page, known)


# --- and each check can fail ---------------------------------------------------------------------


def spoiled(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def answer(route) -> None:
        told = route.fetch().json()
        change(told)
        route.fulfill(json=told)

    return answer


def of_detail(change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[Any], None]]:
    return {"**/api/token": spoiled(change)}


def of_start(change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[[Any], None]]:
    return {"**/api/start/en": spoiled(change)}


def scaled(*path: str | int) -> Callable[[Any], None]:
    """Make a number of an answer another one."""

    def change(told: Any) -> None:
        for step in path[:-1]:
            told = told[step]
        told[path[-1]] = told[path[-1]] * 1.3 + 1

    return change


WRONG = {
    "prompt": of_start(scaled("model", "reference", "active")),
    "flow": of_detail(scaled("attention", "mean", 0)),
    "tokens": of_detail(scaled("neighbours", 0, "similarity")),
    "attention": of_start(scaled("model", "cache", "kept")),
    "router": of_detail(
        lambda told: scaled("router", "scores", told["router"]["topk_ids"][0])(told)
    ),
    "experts": of_detail(scaled("router", "topk_weights", 0)),
    "merge": of_detail(scaled("merge", "residual_norm_after")),
    "next": of_detail(scaled("candidates", 0, "probability")),
    "balance": of_start(scaled("specialization", "load", 0, 0, 0)),
    "dense": {"**/api/dense": spoiled(scaled("held_out", "prose", 1))},
    "summary": of_start(scaled("model", "parameters", "total")),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_wrong_number_is_noticed(open_page, engine: Model, name: str) -> None:
    page = open_page("lang=en&max=2", routes=WRONG[name])
    page.get_by_test_id("prompt").fill("The moon")
    page.get_by_test_id("reset").click()
    settle(page)
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    known = Known(page, engine, "en")
    with pytest.raises(AssertionError):
        CHECKS[name](page, known)


# --- a study of twins, made up -------------------------------------------------------------------


def made_up() -> TwinStudy:
    """One of each outcome: ahead, undecided, behind."""
    domains = ("prose", "models")
    leads = ((0.09, 0.02), (-0.005, 0.015), (-0.12, 0.03), (0.01, 0.004))
    runs = [TwinRun("mixture", 30_000_000, 8_600_000, 3_276_800, 1710.0, {}, None)]
    for name, (value, half) in zip(RUNS[1:], leads, strict=True):
        parameters = 8_600_000 if name.startswith("active") else 30_100_000
        tokens = 3_276_800 if name in AT_EQUAL_TOKENS else 6_123_000
        lead = Interval(value, value - half, value + half)
        runs.append(TwinRun(name, parameters, parameters, tokens, 543.0, {}, lead))
    for at, run in enumerate(runs):
        run.held_out.update({domain: 4.1 + at / 7 + i / 3 for i, domain in enumerate(domains)})
    return TwinStudy(runs)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_studys_numbers_are_those_of_its_file(open_page, language: str) -> None:
    study = made_up()
    told = json.loads(study.to_json())
    shown = spoiled(lambda answer: answer.update(study=told))
    page = open_page(f"lang={language}&max=2", routes={"**/api/dense": shown})
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("dense-study").wait_for(timeout=120_000)
    assert page.get_by_test_id("no-large").count() == 0
    study_numbers(page, study, language)
    study.runs[2].held_out["prose"] += 0.1
    with pytest.raises(AssertionError, match="total"):
        study_numbers(page, study, language)
