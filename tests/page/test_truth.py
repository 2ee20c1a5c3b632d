"""A reader's path: sentences and pictures whose numbers are held against the engine's."""

import re

import pytest
from reader import LANGUAGES, STATIONS, TEXT, settle, token_ids, write

from moescope.api import Model
from moescope.catalog import BOX
from moescope.model.costs import count_parameters
from moescope.scope.bytes import WeightBytes
from moescope.scope.detail import Reading
from moescope.scope.specialization import Specialization
from moescope.text.deepseek_vocabulary import deepseek_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.page]


def detail(page, engine: Model):
    """What the engine says of the selected token in the selected layer."""
    from moescope.engine.sampling import SamplingParams

    ids = token_ids(page)
    chips = page.get_by_test_id("token").all()
    index = next(i for i, c in enumerate(chips) if c.get_attribute("aria-selected") == "true")
    layer = int(page.get_by_test_id("layer").input_value())
    return Reading(engine.engine, ids).token(index, layer, SamplingParams())


def test_the_chosen_are_the_highest_ends(open_page, engine: Model) -> None:
    """Score and bias decide together; the picture may not say otherwise."""
    page = open_page("lang=en")
    write(page, TEXT["zh"])
    for place in (1, 3, 5):
        page.get_by_test_id("token").nth(place).click()
        settle(page)
        bars = page.get_by_test_id("router-score").all()
        ends = {
            int(b.get_attribute("data-expert")): float(b.get_attribute("data-choice")) for b in bars
        }
        chosen = {
            int(b.get_attribute("data-expert"))
            for b in bars
            if b.get_attribute("data-chosen") == "true"
        }
        router = detail(page, engine).router
        assert router is not None
        assert set(sorted(ends, key=lambda e: -ends[e])[: len(chosen)]) == chosen
        assert chosen == set(router.topk_ids)
        offset = sum(router.bias) / len(router.bias)
        for expert, end in ends.items():
            whole = router.scores[expert] + router.bias[expert] - offset
            assert end == pytest.approx(whole, abs=1e-6)
    sentence = page.get_by_test_id("station-router").locator("header p").inner_text()
    assert "bias" in sentence


def test_flow_and_merge_each_name_their_measure(open_page, engine: Model) -> None:
    page = open_page("lang=en")
    write(page, TEXT["en"])
    found = detail(page, engine)
    assert found.router is not None and found.merge is not None
    flow = page.get_by_test_id("station-flow").inner_text()
    for weight in found.router.topk_weights:
        assert f"× {round(weight, 2):g}" in flow
    assert "of this layer" not in page.get_by_test_id("station-flow").inner_html()
    shared = next(c for c in found.merge.contributions if c.expert is None)
    share = round(100 * shared.projection / found.merge.output_norm)
    told = page.get_by_test_id("shared-share").inner_text()
    assert f"{share}%" in told and "length" in told


@pytest.mark.parametrize("language", LANGUAGES)
def test_twins_are_compared_on_text_that_neither_wrote(
    open_page, engine: Model, language: str
) -> None:
    page = open_page(f"lang={language}")
    write(page, TEXT[language])  # too little of the reader's own
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("dense-text").wait_for()
    tokens = int(re.findall(r"\d+", page.get_by_test_id("dense-text").inner_text())[0])
    assert tokens >= 100
    read = WeightBytes.of(engine.network)
    config = engine.network.config
    moe = len(read.expert)
    expected = read.always + config.num_experts_per_tok * sum(read.expert.values()) / moe * moe
    shown = page.locator("[data-measure=bytes]").first.get_attribute("data-value")
    assert float(shown) == pytest.approx(expected, rel=1e-6)
    asked: list[dict] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if "api/dense" in r.url else None)
    long = " ".join([TEXT["en"]] * 12)
    write(page, long)
    page.get_by_test_id("dense-moe").click()
    settle(page)
    assert asked[-1]["ids"] == engine.engine.encode(long)  # and nothing that was made


def test_the_balance_opens_on_a_domains_text(open_page) -> None:
    page = open_page("lang=en")
    page.get_by_test_id("station-balance").scroll_into_view_if_needed()
    page.get_by_test_id("balance-copy").wait_for()
    found = Specialization.from_file(BOX / "tiny" / "specialization.json")
    loads = found.load[0]
    violation = sum(max(layer) * len(layer) / sum(layer) - 1 for layer in loads) / len(loads)
    shown = page.get_by_test_id("balance-own").get_attribute("data-max-violation")
    assert float(shown) == pytest.approx(violation, rel=1e-2)


def test_the_reader_is_not_left_at_the_end_token(open_page) -> None:
    page = open_page(
        "lang=en&prompt=%3C%EF%BD%9CUser%EF%BD%9C%3E17%2B25%3D%3F%3C%EF%BD%9CAssistant%EF%BD%9C%3E"
    )
    page.get_by_test_id("play").click()
    page.locator("[data-testid=play][aria-pressed=true]").wait_for()
    page.locator("[data-testid=play][aria-pressed=false]").wait_for()
    settle(page)
    text = "".join(c.locator(".text").inner_text() for c in page.get_by_test_id("token").all())
    assert text.endswith("<end>") and "42" in text
    chosen = page.locator("[data-testid=token][aria-selected=true] .text").inner_text()
    assert chosen != "<end>"


def test_layers_count_as_people_do_and_chips_say_which(open_page, engine: Model) -> None:
    page = open_page("lang=en&layer=0")
    layers = engine.network.config.num_hidden_layers
    settle(page)
    bar = page.locator("div.bar:has([data-testid=layer])").inner_text()
    assert f"1 / {layers}" in bar and "Layer 1 is dense" in bar and "layer 2" in bar
    page.get_by_test_id("layer").press("End")
    settle(page)
    assert f"Layer {layers} of {layers}" in page.get_by_test_id("station-flow").inner_text() or (
        f"Layer {layers} of {layers}" in page.get_by_test_id("station-flow").text_content()
    )


NAMES = set(
    "moescope tiny English DeepSeek DeepSeek-R1 DeepSeek-V3 R1 R1-Zero H100 H200 LLM DeepSeekMoE "
    "Dai Transformer inference reasoning softmax "
    "sigmoid ReLU ReMoE top-k top-p min-p gate up down silu MaxVio FLOPs GRPO oneDNN NVIDIA NIM "
    "Fireworks Cerebras plan Python SVG PNG GB MB KB ms think write carry".lower().split()
)
"""What has no other name in Chinese; `write` and `carry` are explained where they stand."""
SAID = """(main) => {
  const of_text = '[data-testid=token], [data-testid=candidate], [data-testid=expert-name], p.name,'
    + '.chip,'
    + '[data-testid=reasoning-question], [data-testid=reasoning-asked],'
    + '.text, .example, .typical, textarea, ol[aria-label] li, .live, [lang]:not(html), .number';
  const words = [];
  const walker = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const holder = walker.currentNode.parentElement;
    if (!holder.closest(of_text) && !holder.closest('svg')) words.push(walker.currentNode.data);
  }
  for (const node of main.querySelectorAll('[aria-label], [title], [alt], [placeholder]'))
    if (!node.closest(of_text) && !node.closest('svg'))
      for (const name of ['aria-label', 'title', 'alt', 'placeholder'])
        words.push(node.getAttribute(name) ?? '');
  return words.join('\\n');
}"""
"""All that the page says itself, in sight or to screen readers, without the text that it shows."""


def test_every_english_word_on_the_chinese_page_is_a_name(open_page) -> None:
    page = open_page("lang=zh&max=8")
    write(page, TEXT["zh"])
    for button in ("dense-moe", "think", "write-both"):
        page.get_by_test_id(button).click()
    page.get_by_test_id("dense-text").wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((more) => (more.open = true))")
    for station in STATIONS:
        page.get_by_test_id(f"station-{station}").scroll_into_view_if_needed()
        settle(page)
    said = page.locator("main").evaluate(SAID)
    words = {word.lower() for word in re.findall(r"[A-Za-z][A-Za-z\d-]*[A-Za-z\d]", said)}
    assert words - NAMES == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_link_that_asks_for_too_much_is_answered_in_words(open_page, language: str) -> None:
    for query, numbers in (
        ("k=99", ("99", "64")),
        ("off=3:99", ("4", "99", "63")),
        ("ids=1.99999", ("99,999", "16,384")),
    ):
        page = open_page(f"lang={language}&{query}", wait="error")
        told = page.get_by_test_id("error").locator("p").inner_text()
        assert all(number in told for number in numbers), told
        assert (re.search(r"[A-Za-z]", told) is None) == (language == "zh")


def test_nothing_is_left_in_english_on_the_chinese_page(open_page) -> None:
    page = open_page("lang=zh")
    write(page, TEXT["zh"])
    page.get_by_test_id("dense-moe").click()
    page.get_by_test_id("dense-text").wait_for()
    page.get_by_test_id("own-text").scroll_into_view_if_needed()
    settle(page)
    text = page.locator("main").inner_text()
    for word in ("<begin>", "<end>", "MaxVio", "nat", "dense", "layer", "token"):
        assert not re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", text), word
    assert "<开始>" in text


def test_a_refusal_is_told_in_the_readers_language(open_page) -> None:
    page = open_page("lang=zh")
    page.get_by_test_id("prompt").fill("月 " * 2000)
    page.get_by_test_id("play").click()
    page.get_by_test_id("error").wait_for()
    assert re.fullmatch(r"[^A-Za-z]+", page.get_by_test_id("error").locator("p").inner_text())


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_with_a_number_has_the_engines(
    open_page, engine: Model, language: str
) -> None:
    page = open_page(f"lang={language}")
    write(page, TEXT[language])
    config, counted = engine.network.config, count_parameters(engine.network.config)
    found = detail(page, engine)
    used = engine.trace(TEXT[language]).tokens[0].parameters_used
    k, n = config.num_experts_per_tok, config.n_routed_experts
    hero = page.get_by_test_id("first-screen").inner_text()
    assert str(n) in hero and str(k) in hero and f"{round(100 * used / counted.total)}%" in hero
    reference = count_parameters(open_reference())
    assert f"{100 * reference.active / reference.total:.1f}%" in hero
    experts = page.get_by_test_id("station-experts").inner_text()
    assert str(len(found.router.topk_ids)) in experts and f"{100 * k / n:.1f}%" in experts
    cache = page.get_by_test_id("station-attention")
    kept = config.kv_lora_rank + config.qk_rope_head_dim
    full = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    words = cache.text_content()
    assert str(kept) in words and str(full) in words and f"{round(100 * kept / full)}%" in words
    summary = page.get_by_test_id("station-summary").inner_text()
    assert f"{counted.total / counted.active:.1f}" in summary


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_text_is_cut_by_two_vocabularies(open_page, engine: Model, language: str) -> None:
    page = open_page(f"lang={language}")
    write(page, TEXT[language])
    page.get_by_test_id("station-tokens").scroll_into_view_if_needed()
    theirs = page.get_by_test_id("cut-reference")
    theirs.wait_for()
    settle(page)
    ids = [i for i in token_ids(page) if i not in engine.tokenizer.special_ids]
    assert int(page.get_by_test_id("cut-own").get_attribute("data-tokens")) == len(ids)
    deepseek = deepseek_tokenizer()
    assert deepseek is not None
    expected = deepseek.encode(engine.tokenizer.decode(ids))
    assert int(theirs.get_attribute("data-tokens")) == len(expected)
    assert str(len(expected)) in theirs.inner_text() and "129,280" in theirs.inner_text()


def open_reference():
    from moescope.catalog import catalog

    return catalog()["deepseek-r1"].config
