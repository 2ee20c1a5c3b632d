"""What a trace tells of indexers, sinks, tables and streams, and how it is drawn."""

import io
import re
from collections.abc import Iterator

import pytest
import torch
from family_models import COMPRESSED, GROUPED, INDEXED, MIXTURE
from rich.cells import cell_len
from rich.console import Console
from transformers import DeepseekV4Config, DeepseekV32Config, GptOssConfig

from moescope.api import Model
from moescope.cli.drawing import draw
from moescope.errors import UserError
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.detail import Reading
from moescope.scope.trace import Trace

TEXT = "the moon before my bed 床前明月光"
CONFIGS = {
    "deepseek_v32": DeepseekV32Config(**INDEXED, n_group=1, topk_group=1),
    "deepseek_v4": DeepseekV4Config(**COMPRESSED),
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
    draw(opened.trace(TEXT, max_tokens=3), Console(file=file, width=80, color_system=None))
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


def test_a_detail_that_would_be_wrong_is_refused(opened: Model) -> None:
    if opened.network.config.hc_mult is None:
        Reading(opened.engine, opened.engine.encode(TEXT))
    else:
        with pytest.raises(UserError, match="several residual streams"):
            Reading(opened.engine, opened.engine.encode(TEXT))
