"""A text is the same alone and in any company: bit for bit, whatever was read or left before."""

from typing import Any

import pytest
import torch
from family_models import VARIANTS
from hypothesis import given, strategies as st
from native_kernels import chance, examples, needs_extension
from packing import packed_copy
from torch import Tensor

from moescope.engine.blocks import Blocks
from moescope.engine.runner import Runner
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.engine.sequence import Sequence
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.native.decoder import NativeDecoder

pytestmark = needs_extension

SHAPES = ["deepseek_v3, bias", "qwen3_moe", "gpt_oss"]
VOCAB = 97


@pytest.fixture(scope="module", params=[(s, w) for s in SHAPES for w in ("int8", "int4", "bf16")])
def network(request: pytest.FixtureRequest) -> CausalLM:
    shape, weight_format = request.param
    config = read_config(VARIANTS[shape].to_dict())
    network = CausalLM(config)
    initialise(network, seed=1)
    packed = packed_copy(network.eval(), weight_format)
    assert isinstance(packed.model, NativeDecoder) and packed.model.is_joined
    return packed


def answers(
    network: CausalLM,
    prompts: list[list[int]],
    made: int,
    blocks: Blocks,
    runner: Runner | None = None,
    **how: Any,
) -> list[tuple[list[int], Tensor]]:
    """Each prompt's likeliest continuation, and all logits on the way `(made, vocab)`."""
    texts = [
        Sequence(list(ids), SamplingParams(), made, number, request=number)
        for number, ids in enumerate(prompts)
    ]
    logits = continued(runner or Runner(network, blocks), Scheduler(blocks, **how), texts)
    return [(text.ids, torch.stack(logits[text])) for text in texts]


@torch.inference_mode()
def continued(
    runner: Runner, scheduler: Scheduler, texts: list[Sequence]
) -> dict[Sequence, list[Tensor]]:
    """Have all texts end; what the likeliest token of each was taken from."""
    for text in texts:
        scheduler.add(text)
    logits: dict[Sequence, list[Tensor]] = {text: [] for text in texts}
    while scheduler:
        chunks = scheduler.schedule()
        found = runner.run(chunks)
        for chunk in chunks:
            scheduler.advance(chunk)
        for text, row in zip([c.sequence for c in chunks if c.is_last], found, strict=True):
            logits[text].append(row)
            text.ids.append(int(row.argmax()))
            text.room -= 1
            if not text.room:
                scheduler.remove(text)
    return logits


@examples(6)
@given(st.data())
def test_company_and_what_is_known_change_no_bit(network: CausalLM, data: st.DataObject) -> None:
    generator, made = chance(data.draw(st.integers(0, 99))), 8
    beginning = torch.randint(VOCAB, (150,), generator=generator).tolist()
    lengths = st.tuples(st.integers(0, 150), st.integers(1, 20))
    prompts = [
        beginning[:kept] + torch.randint(VOCAB, (new,), generator=generator).tolist()
        for kept, new in data.draw(st.lists(lengths, min_size=2, max_size=6))
    ]
    alone = [
        answers(network, [ids], made, Blocks(64), chunk=None, reuse=False)[0] for ids in prompts
    ]
    for at, (ids, _) in enumerate(alone):  # somebody asks with some of what was made
        if len(ids) < 64:
            prompts.append([*ids[: -made // 2], 5])
            alone += answers(network, prompts[-1:], made, Blocks(64), chunk=None, reuse=False)
        if at == 1:
            break
    order = data.draw(st.permutations(range(len(prompts))))
    limit = data.draw(st.sampled_from([None, 4, 7]))
    blocks = Blocks(64, limit, least_copied=data.draw(st.integers(1, 8)))
    chunk = data.draw(st.sampled_from([None, 1, 7, 64, 65]))
    asked = [prompts[at] for at in order] * 2
    together = answers(network, asked, made, blocks, chunk=chunk, max_running=4)
    for at, (ids, logits) in zip([*order, *order], together, strict=True):
        assert ids == alone[at][0]
        assert torch.equal(logits, alone[at][1])


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("new", [1, 8, 30])
def test_a_short_turn_is_read_as_what_was_made_in_any_company(
    network: CausalLM, new: int, chunk: int | None
) -> None:
    generator, made = chance(new), 6
    begun = torch.randint(VOCAB, (150,), generator=generator).tolist()
    asked = torch.randint(VOCAB, (new,), generator=generator).tolist()
    others = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (90, 20)]
    for company in ([], others):
        blocks = Blocks(64, 12, least_copied=1)
        how = {"runner": Runner(network, blocks), "chunk": chunk, "short_turn": 30}
        told = answers(network, [begun], made, blocks, **how)[0][0][:-1]
        found = answers(network, [[*told, *asked], *company], made, blocks, **how)[0][1]
        as_made = Sequence(list(begun), SamplingParams(), made)
        as_made.ids = [*told, *asked]
        blocks = Blocks(64)
        wanted = continued(Runner(network, blocks), Scheduler(blocks, reuse=False), [as_made])
        assert torch.equal(found, torch.stack(wanted[as_made]))


@pytest.mark.parametrize("chunk", [None, 65, 512])
def test_company_changes_no_bit_of_long_texts(network: CausalLM, chunk: int | None) -> None:
    """Single tokens walk their slots in several runs, prompts meet them in several blocks."""
    generator, made = chance(5), 6
    whole = torch.randint(VOCAB, (1100,), generator=generator).tolist()
    prompts = [whole[:1021], whole[:40], whole, whole[:130]]
    alone = [
        answers(network, [ids], made, Blocks(64), chunk=None, reuse=False)[0] for ids in prompts
    ]
    together = answers(network, prompts * 2, made, Blocks(64), chunk=chunk, max_running=4)
    for (ids, logits), (alone_ids, alone_logits) in zip(together, alone * 2, strict=True):
        assert ids == alone_ids
        assert torch.equal(logits, alone_logits)
