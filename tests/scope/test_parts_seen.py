"""What a trace tells of indexers, sinks, tables and streams, and how it is drawn."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from family_models import COMPRESSED, GROUPED, INDEXED, MIXTURE
from rich.cells import cell_len
from rich.console import Console
from transformers import DeepseekV4Config, DeepseekV32Config, GlmMoeDsaConfig, GptOssConfig

from moescope.api import Model
from moescope.cli.drawing import draw
from moescope.engine.sampling import SamplingParams
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.detail import Reading
from moescope.scope.parts import Parts
from moescope.scope.recording import TraceRecorder
from moescope.scope.trace import Trace

TEXT = "the moon before my bed 床前明月光"
CONFIGS = {
    "deepseek_v32": DeepseekV32Config(**INDEXED, n_group=1, topk_group=1),
    "deepseek_v4": DeepseekV4Config(**COMPRESSED),
    "glm_moe_dsa, shared picks": GlmMoeDsaConfig(
        **INDEXED, indexer_types=["full", "shared", "full"], attention_bias=True
    ),
    "gpt_oss": GptOssConfig(**GROUPED, **MIXTURE, num_local_experts=12),
}


@pytest.fixture(params=CONFIGS)
def opened(request: pytest.FixtureRequest, model: Model) -> Iterator[Model]:
    fields = CONFIGS[request.param].to_dict() | {"vocab_size": 300}
    network = CausalLM(read_config(fields)).eval()
    initialise(network, 0)
    yield Model(request.param, network, model.tokenizer)


def test_a_trace_tells_of_every_part(opened: Model) -> None:
    trace, config = opened.trace(TEXT, max_tokens=3, attention=True), opened.network.config
    assert Trace.from_json(trace.to_json()) == trace
    tokens = len(trace.tokens)
    for layer_idx, layer in enumerate(trace.layers):
        rate = config.compress_rate_of(layer_idx)
        indexed = config.uses_mla or config.layer_types[layer_idx].endswith("sparse_attention")
        assert (layer.picks is not None) == (config.index_topk is not None and indexed)
        if layer.picks is not None:
            assert layer.picks.tokens_per_slot == (rate or 1)
            past = [(at + 1) // (rate or 1) for at in range(tokens)]
            assert [len(slots) for slots in layer.picks.slots] == [
                min(count, config.index_topk) for count in past
            ]
        assert (layer.entry_attention is not None) == (rate is not None)
        has_sinks = config.attention_sinks or config.compress_rates is not None
        assert (layer.sink_share is not None) == has_sinks
        if layer.sink_share is not None:
            seen = torch.tensor(layer.attention).sum(dim=-1)
            if layer.entry_attention is not None:
                seen = seen + torch.tensor(layer.entry_attention).sum(dim=-1)
            torch.testing.assert_close(1 - seen.mean(dim=0), torch.tensor(layer.sink_share))
        assert (layer.mixing is not None) == (config.hc_mult is not None)
        if layer.mixing is not None:
            for half in layer.mixing:
                shape = (tokens, config.hc_mult, config.hc_mult)
                assert tuple(torch.tensor(half.mix).shape) == shape
        by_table = layer.router is not None and layer.router.by_table
        assert by_table == (layer_idx < config.num_hash_layers)


def test_explain_has_a_line_for_each(opened: Model) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None)
    draw(opened.trace(TEXT, max_tokens=3), opened.tokenizer, console)
    lines = file.getvalue().splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80
    told = file.getvalue()
    config = opened.network.config
    wanted = {
        r"索引器让它看到|the indexer shows it \d+ of": config.index_topk,
        r"汇点|goes to the sinks": config.attention_sinks or config.compress_rates,
        r"固定表|fixed table": config.num_hash_layers,
        r"残差流|streams": config.hc_mult,
    }
    for pattern, has in wanted.items():
        assert bool(re.search(pattern, told)) == bool(has), pattern


def test_a_detail_is_what_the_whole_pass_did(opened: Model) -> None:
    """Layers of several streams, or with shared picks, included."""
    ids = opened.engine.encode(TEXT)
    reading, recorder = Reading(opened.engine, ids), TraceRecorder(wants_attention=True)
    opened.network.model(torch.tensor([ids]), recorder=recorder)
    index = len(ids) - 2
    for layer_idx in range(opened.network.config.num_hidden_layers):
        detail = reading.token(index, layer_idx, SamplingParams())
        attention, mean = detail.attention, recorder.attentions[layer_idx][:, index].mean(dim=0)
        assert attention.mean == pytest.approx(mean[: index + 1].tolist(), abs=1e-6)
        rest = sum(attention.entries) + (attention.sink_share or 0.0)
        assert sum(attention.mean) + rest == pytest.approx(1, abs=1e-5)
        picks = recorder.picked.get(layer_idx)
        assert (attention.seen and attention.seen.slots) == (picks and picks.slots[index])
        mixing = recorder.mixings.get(layer_idx)
        assert (detail.mixing is None) == (mixing is None)
        if detail.mixing and mixing:
            whole = mixing["feed_forward"].mix[index]
            np.testing.assert_allclose(detail.mixing[1].mix, whole, atol=1e-6)
        if layer_idx in recorder.routings:
            routed, shared = recorder.outputs[layer_idx]
            whole = routed[index] + (shared[index] if shared is not None else 0)
            assert detail.merge is not None and detail.router is not None
            assert detail.merge.output_norm == pytest.approx(float(whole.norm()), rel=1e-4)
            assert detail.router.by_table == recorder.routings[layer_idx].by_table
            chosen = recorder.routings[layer_idx].topk_ids[index].tolist()
            assert sorted(detail.router.topk_ids) == sorted(chosen)


def test_a_text_read_in_parts_was_read_as_a_whole(opened: Model) -> None:
    ids = opened.engine.encode(TEXT)
    whole, parts = Reading(opened.engine, ids), Reading(opened.engine, ids, Parts(tokens=5))
    for index in (0, 6, len(ids) - 1):
        for layer in range(opened.config.num_hidden_layers):
            one, other = (r.token(index, layer, SamplingParams()) for r in (whole, parts))
            assert other.hidden_norms == pytest.approx(one.hidden_norms, rel=1e-4)
            assert other.attention.seen == one.attention.seen
            assert other.attention.mean == pytest.approx(one.attention.mean, abs=1e-5)
            assert (other.router and other.router.topk_ids) == (one.router and one.router.topk_ids)
            assert (one.mixing is None) == (other.mixing is None)
            for half, same in zip(one.mixing or (), other.mixing or (), strict=True):
                assert half.pre == pytest.approx(same.pre, abs=1e-5)


def test_a_reading_goes_on_as_if_the_text_were_read_at_once(opened: Model) -> None:
    ids, params = opened.engine.encode(TEXT), SamplingParams()
    begun = Reading(opened.engine, ids[:5])
    going = Reading(opened.engine, ids[:6], begun=begun)
    grown, whole = Reading(opened.engine, ids, begun=going), Reading(opened.engine, ids)
    assert not begun.begins(ids) and not going.begins(ids)  # each hands on what it remembers
    for step, same in zip(grown.steps(), whole.steps(), strict=True):
        assert step.layers == [
            layer and replace(layer, topk_weights=approx(layer.topk_weights), shared_share=ANY)
            for layer in same.layers
        ]
        assert step.logprob == (same.logprob and approx(same.logprob))
    for layer_idx in range(opened.config.num_hidden_layers):
        for index in (4, 5, len(ids) - 1):
            detail, same = (r.token(index, layer_idx, params) for r in (grown, whole))
            assert detail.hidden_norms == approx(same.hidden_norms)
            assert detail.attention.seen == same.attention.seen
            assert detail.attention.mean == approx(same.attention.mean)
            assert (detail.mixing is None) == (same.mixing is None)
            if detail.mixing is not None and same.mixing is not None:
                assert detail.mixing[1].pre == approx(same.mixing[1].pre)
            assert [c.id for c in detail.candidates[:3]] == [c.id for c in same.candidates[:3]]
    # What was handed on tells of its own text as before, and another text begins anew.
    assert begun.token(4, 1, params).picked == whole.token(4, 1, params).picked
    other = Reading(opened.engine, [*ids[:5], ids[1]], begun=begun)
    assert other.steps()[-1].id == ids[1]


def approx(values: object) -> object:
    return pytest.approx(values, rel=1e-3, abs=1e-5)
