"""Rows of one call whose routers are their own: each row's numbers are those of the row alone."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packing import packed_copy

from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.cache import Cache
from moescope.model.decoder import CausalLM, initialise
from moescope.model.steering import Steering, steered_gates
from moescope.native.decoder import NativeDecoder

pytestmark = pytest.mark.skipif(not cpu.available(), reason="test_cpu.py says why this is fine")

VOCAB, LAYERS = 40, (1, 2)


def decoder_of(experts: int, top_k: int) -> tuple[CausalLM, NativeDecoder]:
    """One dense layer and two of so many experts."""
    config = read_config(
        {
            "model_type": "deepseek_v2",
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 20,
            "moe_intermediate_size": 12,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "n_routed_experts": experts,
            "num_experts_per_tok": top_k,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "initializer_range": 0.3,
        }
    )
    network = CausalLM(config)
    initialise(network, seed=experts)
    packed = packed_copy(network.eval(), "bf16")
    assert isinstance(packed.model, NativeDecoder) and packed.model.is_joined
    return packed, packed.model


def read(
    decoder: NativeDecoder, rows: list[list[int]], sets: list[Any], set_of_row: list[int]
) -> tuple[list[torch.Tensor], cpu.Chosen]:
    """Read whole texts from their first tokens on, those of one token first."""
    counts = [len(row) for row in rows]
    others = cpu.RowRouters(sets, set_of_row) if sets else None
    chosen = decoder.choices(sum(counts), others)
    states = decoder.run_rows(
        [token for row in rows for token in row],
        [at for count in counts for at in range(count)],
        [*accumulate(counts, initial=0)],
        sum(count == 1 for count in counts),
        Cache(),
        max(counts),
        None,
        others,
        chosen,
    )
    return list(states.split(counts)), chosen


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(experts=st.sampled_from([1, 2, 15, 16, 17, 33]), data=st.data())
def test_a_row_is_what_it_is_alone(isa: str, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(experts, 6)))
    network, decoder = decoder_of(experts, top_k)
    some = st.sets(st.tuples(st.sampled_from(LAYERS), st.integers(0, experts - 1)), max_size=4)
    steerings: list[Steering] = []
    for _ in range(data.draw(st.integers(1, 3))):
        forced = data.draw(some)
        off = {one for one in data.draw(some) - forced if experts > 4}
        most = data.draw(st.one_of(st.none(), st.integers(1, experts)))
        steerings.append(Steering(most, disabled=off, forced=forced))
    sets = [decoder.joined_routers(steered_gates(network, one)) for one in steerings]
    lengths = sorted(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    ids = torch.randint(VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(experts))
    rows = [part.tolist() for part in ids.split(lengths)]
    set_of_row = [data.draw(st.integers(-1, len(sets) - 1)) for _ in rows]
    together, chosen = read(decoder, rows, sets, set_of_row)
    first = 0
    for row, at, states in zip(rows, set_of_row, together, strict=True):
        (alone,), own = read(decoder, [row], [] if at < 0 else [sets[at]], [0])
        assert torch.equal(states, alone)
        slots, last = own.ids.shape[-1], first + len(row)
        for name in ("ids", "weights", "scores"):
            whole, part = getattr(chosen, name)[:, first:last], getattr(own, name)
            assert torch.equal(whole[..., :slots], part)
            assert (whole[..., slots:] == (-1 if name == "ids" else 0)).all()
        first = last


def test_what_does_not_fit_is_refused() -> None:
    network, decoder = decoder_of(8, 2)
    routers = decoder.joined_routers(steered_gates(network, Steering(num_experts_per_tok=3)))
    smaller, other = decoder_of(4, 2)
    foreign = other.joined_routers(steered_gates(smaller, Steering(num_experts_per_tok=1)))
    for sets, set_of_row, wrong in [
        ([routers[1:]], [0], "every layer needs its routers"),
        ([foreign], [0], "the routers do not fit the network"),
        ([[None, None, None]], [0], "the routers do not fit the network"),
        ([routers], [0, 0], "every row needs routers"),
        ([routers], [1], "there are no such routers"),
        ([routers], [-2], "there are no such routers"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            read(decoder, [[1, 2, 3]], sets, set_of_row)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"starts": [0, 9, 3]}, "too few or many tokens"),
        ({"starts": [0, 3, 3]}, "too few or many tokens"),
        ({"starts": [0, 1, 2]}, "not all tokens"),
        ({"starts": [0, 1]}, "do not fit the network"),
        ({"positions": [0, 0]}, "do not fit the network"),
        ({"positions": [0, 0, 4]}, "not in the cache"),
        ({"positions": [0, 0, -1]}, "not in the cache"),
        ({"tables": [[0], [1, 0]]}, "unequal length"),
        ({"tables": [[0], [2]]}, "block that there is not"),
        ({"input_ids": [0, 1, VOCAB]}, "not in the vocabulary"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    if not cpu.available():
        return
    _, decoder = decoder_of(2, 1)
    form = decoder.slot_form
    slots = cpu.cache_slots([form.slots(2, 4) for _ in range(3)])
    right = {
        "input_ids": [0, 1, 2],
        "hidden": decoder.embed_tokens.embedding_dim,
        "positions": [0, 0, 1],
        "starts": [0, 1, 3],
        "singles": 1,
        "tables": [[0], [1]],
        "slots": slots,
    }
    assert decoder.all_layers is not None
    assert cpu.run_decoder(decoder.all_layers, **right).isfinite().all()
    with pytest.raises(ValueError, match=message):
        cpu.run_decoder(decoder.all_layers, **right | changed)
