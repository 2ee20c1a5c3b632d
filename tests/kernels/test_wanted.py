"""What the last layer leaves out for tokens whose outputs nobody wants changes nothing else."""

from itertools import accumulate

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

VOCAB = 40
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "initializer_range": 0.3,
}
LATENT = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 9,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "latents": LATENT,
    "queries of low rank": LATENT | {"q_lora_rank": 12},
    "dense at last": LATENT | {"first_k_dense_replace": 3},
    "groups": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 9,
    },
}


class Rows:
    """Texts of several lengths, those of one token first, read from a cache of their own."""

    def __init__(self, family: str, lengths: list[int], weights: str, steered: bool) -> None:
        network = CausalLM(read_config(COMMON | FAMILIES[family]))
        initialise(network, seed=len(lengths))
        packed = packed_copy(network.eval(), weights)
        assert isinstance(packed.model, NativeDecoder) and packed.model.is_joined
        self.decoder, self.lengths, self.cache = packed.model, sorted(lengths), Cache()
        self.others = None
        if steered and any(self.decoder.joined_gates):
            gates = steered_gates(packed, Steering(2, forced={(2, 1)}))
            places = [at % 2 - 1 for at in range(len(lengths))]
            self.others = cpu.RowRouters([self.decoder.joined_routers(gates)], places)
        self.generator = torch.Generator().manual_seed(sum(lengths))

    def read(
        self,
        counts: list[int],
        known: list[int],
        wanted: list[int] | None,
        *,
        ids_alone: bool = False,
    ) -> tuple[torch.Tensor, cpu.Chosen]:
        total = sum(counts)
        chosen = self.decoder.choices(total, self.others, ids_alone=ids_alone)
        states = self.decoder.run_rows(
            torch.randint(VOCAB, (total,), generator=self.generator).tolist(),
            [at for k, n in zip(known, counts, strict=True) for at in range(k, k + n)],
            [*accumulate(counts, initial=0)],
            sum(count == 1 for count in counts),
            self.cache,
            max(k + n for k, n in zip(known, counts, strict=True)),
            wanted,
            self.others,
            chosen,
        )
        return states, chosen

    def read_whole(
        self, wanted: list[int] | None, *, ids_alone: bool = False
    ) -> tuple[torch.Tensor, cpu.Chosen]:
        return self.read(self.lengths, [0] * len(self.lengths), wanted, ids_alone=ids_alone)

    def read_one_more(self) -> torch.Tensor:
        return self.read([1] * len(self.lengths), self.lengths, None)[0]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(list(FAMILIES)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    weights=st.sampled_from(["bf16", "int8", "int4"]),
    steered=st.booleans(),
    data=st.data(),
)
def test_wanted_tokens_are_what_they_are_among_all(
    isa: str, family: str, lengths: list[int], weights: str, steered: bool, data: st.DataObject
) -> None:
    total = sum(lengths)
    wanted = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    some, every, unasked = (Rows(family, lengths, weights, steered) for _ in range(3))
    states, chosen = some.read_whole(wanted)
    all_states, all_chosen = every.read_whole(None)
    assert torch.equal(states, all_states[wanted])
    for name, nothing in (("ids", -1), ("weights", 0), ("scores", 0)):
        found, expected = getattr(chosen, name), getattr(all_chosen, name).clone()
        if len(expected) and family != "dense at last":
            left_out = [token for token in range(total) if token not in wanted]
            expected[-1, left_out] = nothing
        assert torch.equal(found, expected)
    assert torch.equal(some.read_one_more(), every.read_one_more())
    same, ids_alone = unasked.read_whole(wanted, ids_alone=True)
    assert torch.equal(same, states) and torch.equal(ids_alone.ids, chosen.ids)
    assert ids_alone.weights is None and ids_alone.scores is None


@pytest.mark.parametrize("wanted", [[1, 0], [0, 0], [-1], [3]])
def test_what_is_not_there_or_not_in_order_is_refused(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted tokens are not in order, or not there"):
        Rows("groups", [3], "bf16", steered=False).read_whole(wanted)
