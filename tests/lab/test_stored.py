"""Headers summed up, against the network's own count and gguf's reader."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf_models import V2, V3, network, write

from moescope.catalog import BOX
from moescope.checkpoint import save_weights
from moescope.errors import UserError
from moescope.formats.headers import FIRST_BYTES
from moescope.lab.plan import _cache, plan
from moescope.lab.stored import Stored, part_of
from moescope.model.costs import count_parameters, held_numbers

PARTS = ("embedding", "attention", "dense_mlp", "routed_experts", "shared_experts", "lm_head")


def parts_of(made) -> dict[str, int]:
    return {part: sum(made.stored.parts.get(part, {}).values()) for part in PARTS}


@pytest.mark.parametrize("fields", [V2, V3], ids=["V2", "V3"])
def test_every_part_weighs_what_the_network_counts(fields: dict, tmp_path: Path) -> None:
    made = network(fields)
    counted = dataclasses.asdict(count_parameters(made.config))
    save_weights(made, tmp_path / "folder", max_shard_bytes=1 << 18)
    write(made, tmp_path / "m.gguf")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    for path in (tmp_path / "folder", tmp_path / "m.gguf"):
        planned = plan(path)
        assert parts_of(planned) == {part: 4 * counted[part] for part in PARTS}
        assert planned.stored is not None and list(planned.stored.kinds) == ["F32"]
        active = 4 * counted["active_without_embedding"]
        assert planned.stored.active_bytes == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize("kind", [*GGMLQuantizationType.__members__, "I8", "U8", "F8_E4M3"])
def test_a_plan_knows_the_cache_beside_every_type(kind: str) -> None:
    """Float32 where kernels round nothing, else bf16; what they lack is rounded to eight bits."""
    config = network(V3).config
    found = _cache(config, Stored(1, 1, {kind: 1}, {"attention": {kind: 1}}))
    size = 4 if kind in ("F32", "F16", "BF16", "F8_E4M3") else 2
    assert found.engine_bytes_per_token["stored"] == size * held_numbers(config)


def test_a_folder_in_int8_is_planned() -> None:
    made = plan(BOX / "tiny")
    assert made.stored is not None and "I8" in made.stored.kinds
    assert made.cache.engine_bytes_per_token["stored"] == 2 * held_numbers(made.config)


def test_types_weigh_what_ggufs_reader_says(tmp_path: Path) -> None:
    path = write(network(V3), tmp_path / "m.gguf", "Q8_0")
    told: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        told[tensor.tensor_type.name] += tensor.n_bytes
    made = plan(path)
    assert made.stored is not None
    assert made.stored.kinds == dict(told.most_common())
    assert made.fits[0].format == "stored"
    cached = made.cache.engine_bytes_per_token["stored"] * made.work.context
    assert made.fits[0].needed == made.stored.bytes + cached


def test_a_header_longer_than_what_is_read_at_first_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(network(V3), tmp_path / "m.gguf")
    whole = plan(path)
    monkeypatch.setitem(FIRST_BYTES, "gguf", 64)
    assert plan(path).stored == whole.stored


def test_a_header_without_an_end_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = write(network(V3), tmp_path / "m.gguf")
    monkeypatch.setitem(FIRST_BYTES, "gguf", 64)
    monkeypatch.setattr("moescope.formats.headers.MAX_HEADER_BYTES", {"gguf": 128})
    with pytest.raises(UserError, match="its header is longer than"):
        plan(path)


def test_a_part_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*00002-of-00002\.gguf"):
        path = tmp_path / "m-00001-of-00002.gguf"
        path.write_bytes(write(network(V3), tmp_path / "m.gguf").read_bytes())
        plan(path)


def test_names_of_all_families_have_their_part() -> None:
    told = {
        "blk.3.attn_output.weight": "attention",
        "output.weight": "lm_head",
        "output_norm.weight": "norm",
        "blk.3.ffn_gate_exps.weight": "routed_experts",
        "blk.3.ffn_gate.weight": "dense_mlp",
        "blk.3.ffn_gate_inp.weight": "router",
        "model.layers.3.mlp.gate.e_score_correction_bias": "router",
        "model.layers.3.mlp.experts.gate_up_proj_blocks": "routed_experts",
        "model.layers.3.mlp.router.weight": "router",
        "model.layers.3.block_sparse_moe.gate.weight": "router",
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": "routed_experts",
        "model.layers.3.block_sparse_moe.input_linear.weight": "routed_experts",
        "model.layers.3.self_attn.q_norm.weight": "norm",
        "model.layers.3.mlp.gate_proj.weight": "dense_mlp",
    }
    assert {name: part_of(name) for name in told} == told
