"""Which experts served which tokens, and texts whose routers decide otherwise beside others."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from packing import packed_copy
from torch import Tensor

from moescope.api import Model
from moescope.engine import runner
from moescope.engine.engine import Engine
from moescope.engine.routed import ExpertLoad, RoutingRecorder
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.engine.sequence import RoutedTokens, Sequence, Token
from moescope.errors import UserError
from moescope.families import config_fields, read_config
from moescope.kernels import cpu
from moescope.kernels.cpu import Chosen
from moescope.model.decoder import CausalLM, initialise
from moescope.model.steering import Steering, steered
from moescope.native.decoder import NativeDecoder

PROMPTS = ["the moon before my bed, is it frost?", "is", "床前明月光 the moon", "the moon before"]
METHODS = [
    "noaux_tc",
    "greedy",
    "group_limited_greedy",
    "relu",
    "sinkhorn",
    "hash",
    "expert_choice",
]
STEERINGS = [
    Steering(num_experts_per_tok=1),
    None,
    Steering(disabled={(1, 0), (1, 3), (2, 5)}),
    Steering(num_experts_per_tok=5, forced={(2, 7), (1, 2)}),
]
OTHER_RULES = [Steering(rule="softmax", bias={(1, 4): 0.3}), Steering(rule="random"), None]
OTHER_RULES += [Steering(rule="relu", num_experts_per_tok=2)]
LAYERS, EXPERTS, TOP_K = (1, 2), 8, 3
Build = Callable[..., Engine]


@pytest.fixture(params=["torch", "native"])
def build(request: pytest.FixtureRequest, model: Model) -> Build:
    """Make an engine over a small random network of any router, by either backend."""
    if request.param == "native" and not cpu.available():
        pytest.skip("native kernels are not built")

    def build(topk_method: str = "noaux_tc") -> Engine:
        fields = config_fields(model.config) | {"topk_method": topk_method}
        network = CausalLM(read_config(fields | {"n_group": 4, "topk_group": 2}))
        initialise(network, seed=3)
        network = (
            packed_copy(network.eval(), "bf16") if request.param == "native" else network.eval()
        )
        made = Engine(network, model.tokenizer)
        made.blocks.least_copied = 1
        return made

    return build


def read(
    engine: Engine, asked: list[tuple[list[int], SamplingParams]], chunk: int | None = 7
) -> tuple[list[list[Token]], list[Sequence]]:
    """Continue texts beside each other."""
    scheduler = Scheduler(engine.blocks, chunk=chunk)
    texts = [engine.sequence(ids, how, at, request=at) for at, (ids, how) in enumerate(asked)]
    for text in texts:
        scheduler.add(text)
    made: list[list[Token]] = [[] for _ in asked]
    while scheduler:
        for _, event in engine.step(scheduler):
            assert isinstance(event, Token), event
            made[event.row].append(event)
    return made, texts


def routed_of(tokens: list[Token]) -> RoutedTokens:
    return RoutedTokens.join(token.routed for token in tokens if token.routed is not None)


def spread(ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`(..., slots)` by expert: `(..., experts)`, 0 where an expert was not chosen."""
    whole = torch.zeros(*ids.shape[:-1], EXPERTS + 1)
    return whole.scatter_(-1, ids.long() + 1, values)[..., 1:]


def params(steering: Steering | None = None, **more: Any) -> SamplingParams:
    fields = {"max_tokens": 8, "ignore_eos": True, "routed_experts": True, **more}
    return SamplingParams(**fields, steering=steering)


@pytest.mark.parametrize("topk_method", METHODS)
def test_each_token_is_told_the_experts_of_a_pass_over_the_whole_text(
    build: Build, topk_method: str
) -> None:
    engine = build(topk_method)
    asked = [(engine.encode(prompt), params()) for prompt in PROMPTS]
    made, texts = read(engine, asked)
    for (ids, _), tokens, text in zip(asked, made, texts, strict=True):
        assert [token.routed.start for token in tokens if token.routed] == [
            0,
            *range(len(ids), len(ids) + 7),
        ]
        routed, recorder = routed_of(tokens), RoutingRecorder()
        with torch.inference_mode():
            engine.model(torch.tensor([text.ids[:-1]]), recorder=recorder)
        expected = recorder.chosen()
        assert expected is not None and routed.layers == LAYERS
        assert routed.ids.shape[:2] == (len(text.ids) - 1, len(LAYERS))
        for name in ("weights", "scores"):
            ours = spread(routed.ids, getattr(routed, name))
            theirs = spread(expected.ids, getattr(expected, name)).transpose(0, 1)
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("topk_method", METHODS)
@pytest.mark.parametrize("chunk", [2, 512])
def test_a_text_in_a_mixed_batch_is_what_it_is_alone(
    build: Build, topk_method: str, chunk: int
) -> None:
    engine = build(topk_method)
    asked = [
        (engine.encode(prompt), params(steering, temperature=0.7, seed=at))
        for at, (prompt, steering) in enumerate(zip(PROMPTS * 2, STEERINGS * 2, strict=True))
    ]
    together, _ = read(engine, asked, chunk)
    decoder = engine.model.model
    joined = isinstance(decoder, NativeDecoder) and decoder.is_joined
    exact = joined and chunk == 512  # else texts are cut elsewhere, and singles read otherwise
    for (ids, how), tokens in zip(asked, together, strict=True):
        fresh = Engine(engine.model, engine.tokenizer)
        alone = read(fresh, [(ids, how)], chunk)[0][0]
        assert [token.id for token in tokens] == [token.id for token in alone]
        ours, theirs = routed_of(tokens), routed_of(alone)
        if exact:
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.weights, theirs.weights)
            assert [token.logprob for token in tokens] == [token.logprob for token in alone]
        torch.testing.assert_close(
            spread(ours.ids, ours.weights), spread(theirs.ids, theirs.weights), atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("topk_method", METHODS)
def test_a_steered_text_is_that_of_a_steered_network(build: Build, topk_method: str) -> None:
    engine = build(topk_method)
    for steering in STEERINGS + OTHER_RULES:
        whole = steered(engine.model, steering or Steering())
        for prompt in PROMPTS:
            ids = engine.encode(prompt)
            ours = read(engine, [(ids, params(steering))])[0][0]
            theirs = list(Engine(whole, engine.tokenizer).repeat([ids], params()))
            assert [token.id for token in ours] == [token.id for token in theirs]


def test_steering_is_obeyed(build: Build) -> None:
    engine = build()
    asked = [(engine.encode(PROMPTS[0]), params(steering)) for steering in STEERINGS]
    one, plain, without, forced = (routed_of(tokens) for tokens in read(engine, asked)[0])
    assert one.ids.shape[-1] == 1 and plain.ids.shape[-1] == TOP_K and forced.ids.shape[-1] == 5
    assert not ((without.ids[:, 0] == 0) | (without.ids[:, 0] == 3)).any()
    assert not (without.ids[:, 1] == 5).any() and (plain.ids[:, 1] == 5).any()
    assert (forced.ids[:, 1] == 7).any(-1).all() and (forced.ids[:, 0] == 2).any(-1).all()


def test_blocks_are_shared_between_texts_of_the_same_steering_alone(build: Build) -> None:
    engine = build()
    ids = engine.encode(PROMPTS[0])
    for steering in STEERINGS:
        how = params(steering, routed_experts=False)
        _, (first,) = read(engine, [(ids, how)])
        _, (again,) = read(engine, [(ids, how)])
        assert (first.reused, again.reused) == (0, len(ids) - 1)
    _, (told,) = read(engine, [(ids, params())])
    assert told.reused == 0  # something is wanted of each token


def test_an_evicted_text_is_told_of_each_token_once(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BLOCK_TOKENS", 4)
    engine = build()
    ids = engine.encode(PROMPTS[0])
    alone = routed_of(read(engine, [(ids, params())])[0][0])
    engine.limit_cache(runner.bytes_per_block(engine.model, 4) * (len(ids) // 4 * 2 + 2))
    for tokens in read(engine, [(ids, params())] * 3, chunk=3)[0]:
        routed = routed_of(tokens)
        assert torch.equal(routed.ids.sort(-1).values, alone.ids.sort(-1).values)


def test_the_load_is_what_texts_were_told(build: Build) -> None:
    engine = build()
    asked = [(engine.encode(prompt), params()) for prompt in PROMPTS]
    made, texts = read(engine, asked)
    told = torch.cat([routed_of(tokens).ids for tokens in made])  # (tokens, layers, slots)
    for at, layer in enumerate(LAYERS):
        assert engine.runner.load.layers[at] == layer
        counts = told[:, at].flatten().long().bincount(minlength=EXPERTS)
        assert torch.equal(engine.runner.load.tokens[at], counts)
    read_tokens = sum(len(text.ids) - 1 for text in texts)
    assert engine.runner.load.tokens.sum(-1).tolist() == [TOP_K * read_tokens] * 2


def test_the_last_layer_serves_those_whose_next_token_is_wanted(build: Build) -> None:
    engine = build()
    decoder = engine.model.model
    ids = engine.encode(PROMPTS[0])
    read(engine, [(ids, params(routed_experts=False))])
    all_read = len(ids) + 7
    last = 8 if isinstance(decoder, NativeDecoder) else all_read
    counts = engine.runner.load.tokens.sum(-1).tolist()
    assert counts == [TOP_K * all_read, TOP_K * last]


def test_what_is_asked_of_experts_changes_no_number_of_a_text(build: Build) -> None:
    engine = build()
    asked = [(engine.encode(prompt), params(routed_experts=False)) for prompt in PROMPTS]
    unasked, _ = read(engine, asked)
    told, _ = read(build(), [(ids, params()) for ids, _ in asked])
    for ours, theirs in zip(unasked, told, strict=True):
        assert [(token.id, token.logprob) for token in ours] == [
            (token.id, token.logprob) for token in theirs
        ]


def test_a_dense_model_has_nothing_to_tell(model: Model) -> None:
    dense = CausalLM(read_config(config_fields(model.config) | {"n_routed_experts": None}))
    initialise(dense, seed=0)
    engine = Engine(dense.eval(), model.tokenizer)
    tokens = read(engine, [(engine.encode("is"), params())])[0][0]
    assert all(token.routed is None for token in tokens) and not engine.runner.load.layers
    with pytest.raises(UserError, match="no routed experts"):
        engine.sequence([5], params(Steering(num_experts_per_tok=2)))


@pytest.mark.parametrize(
    ("steering", "sentence"),
    [
        (Steering(num_experts_per_tok=9), "num_experts_per_tok is 9; the model has 1 to 8"),
        (Steering(disabled={(0, 1)}), "expert 0:1 is in no layer with routed experts"),
        (Steering(forced={(2, 8)}), "there is no expert 8 in layer 2"),
        (Steering(noise=0.1), "noise on router logits is for all texts of a model"),
    ],
)
def test_what_the_model_cannot_do_is_a_sentence(
    model: Model, steering: Steering, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        model.engine.sequence([5], params(steering))


def test_the_load_counts_passes_of_any_size_from_any_thread() -> None:
    generator = torch.Generator().manual_seed(0)
    load, expected = ExpertLoad((1, 3), experts=6), torch.zeros(2, 6, dtype=torch.int64)
    passes: list[Tensor] = []
    for number in range(400):
        shape = (2, 1 + number % 5, 2 + number % 3)
        passes.append(torch.randint(-1, 6, shape, generator=generator))
        for layer in range(2):
            chosen = passes[-1][layer].flatten()
            expected[layer] += chosen[chosen >= 0].bincount(minlength=6)
    done = Event()

    def look() -> None:
        while not done.is_set():
            assert (load.tokens <= expected).all()

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        for ids in passes:
            load.add(Chosen(ids, ids.float(), ids.float()))
        done.set()
        looking.result()
    assert torch.equal(load.tokens, expected)
