"""Experts that stay on the disk: the same numbers as in memory, and never more than a limit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_models import SMALL

from moescope.api import Model, load
from moescope.checkpoint import save_weights
from moescope.cli.main import run
from moescope.errors import UserError
from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM, initialise
from moescope.native import pack_cache

pytestmark = pytest.mark.skipif(
    not cpu.available() or sys.platform != "linux", reason="experts are streamed on Linux"
)
PROMPT = "the moon before my bed, is it frost?"


@pytest.fixture(autouse=True)
def nothing_is_streamed_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    yield
    cpu.limit_experts(0)


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    model.save(made)
    return made


def expert_bytes(opened: Model) -> int:
    """Bytes of one expert: gate, up and down."""
    experts = opened.network.model.layers[-1].mlp.experts
    return sum(part.matrix_bytes for part in experts.packed)


@pytest.mark.parametrize("weight_format", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("held", [1, 3, 100])
def test_numbers_and_texts_are_those_of_a_model_in_memory(
    folder: Path, weight_format: str, held: int
) -> None:
    plain = load(folder, quantize=weight_format)
    streamed = load(folder, quantize=weight_format, stream_experts=True, expert_memory=1)
    limit = held * expert_bytes(streamed)
    cpu.limit_experts(limit)
    ids = torch.tensor([plain.tokenizer.encode(PROMPT)])
    before = cpu.expert_counts()
    assert torch.equal(streamed.logits(ids), plain.logits(ids))
    text = streamed.generate(PROMPT, max_tokens=12).text
    assert text == plain.generate(PROMPT, max_tokens=12).text
    counts = cpu.expert_counts()
    assert counts.held <= counts.limit == limit
    read = (counts.visits - counts.hits) - (before.visits - before.hits)
    assert counts.bytes_read - before.bytes_read == read * expert_bytes(streamed)
    assert read > 0
    if held == 100:
        assert counts.hits > before.hits
        assert read <= 2 * 8  # two layers of eight experts, each read once


def test_a_second_start_streams_from_the_pack_of_the_first(folder: Path) -> None:
    first = load(folder, quantize="int4", stream_experts=True)
    again = load(folder, quantize="int4", stream_experts=True)
    whole = load(folder, quantize="int4")
    assert first.pack is None and again.pack == whole.pack is not None
    ids = torch.arange(20)[None]
    assert torch.equal(first.logits(ids), again.logits(ids))
    assert torch.equal(first.logits(ids), whole.logits(ids))


def test_a_models_experts_are_forgotten_with_it(folder: Path) -> None:
    streamed = load(folder, quantize="int8", stream_experts=True, expert_memory=2**30)
    streamed.logits(torch.arange(20)[None])
    assert cpu.expert_counts().held > 0
    del streamed
    import gc

    gc.collect()
    assert cpu.expert_counts().held == 0


def test_a_lower_limit_drops_experts_at_once(folder: Path) -> None:
    streamed = load(folder, quantize="int8", stream_experts=True, expert_memory=2**30)
    streamed.logits(torch.arange(20)[None])
    cpu.limit_experts(3 * expert_bytes(streamed))
    assert 0 < cpu.expert_counts().held <= 3 * expert_bytes(streamed)


def test_a_pack_that_was_cut_is_made_anew(folder: Path) -> None:
    load(folder, quantize="int8", stream_experts=True)
    (pack,) = folder.glob("*.pack")
    whole = pack.read_bytes()
    pack.write_bytes(whole[:-4096])
    assert load(folder, quantize="int8", stream_experts=True).pack is None
    assert pack.read_bytes() == whole


def test_what_cannot_be_streamed_is_a_sentence(folder: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match='"torch" holds all experts in memory'):
        load(folder, backend="torch", stream_experts=True)
    monkeypatch.setenv(pack_cache.SWITCH, "off")
    with pytest.raises(UserError, match="MOESCOPE_PACKS not to be off"):
        load(folder, stream_experts=True)


def test_a_model_that_does_not_fit_opens_streamed(folder: Path, monkeypatch) -> None:
    config = load(folder).config
    packer = pack_cache.Packer("int8")
    without, whole = (packer.resident_bytes(config, experts=which) for which in (False, True))
    monkeypatch.setattr("moescope.api.memory", lambda: (2**40, (without + whole) // 2))
    with pytest.raises(UserError, match=r"leave its experts on the disk \(--stream-experts\)"):
        load(folder, quantize="int8")
    assert load(folder, quantize="int8", stream_experts=True)
    assert 0 < cpu.expert_counts().limit < whole - without
    monkeypatch.setattr("moescope.api.memory", lambda: (2**40, without // 2))
    with pytest.raises(UserError, match="the model without its experts takes"):
        load(folder, quantize="int8", stream_experts=True)


def test_the_command_line_says_what_was_read(folder: Path, capsys) -> None:
    options = ["--model", str(folder), "--stream-experts", "--expert-memory", "0.001"]
    assert run(["generate", PROMPT, "--max-tokens", "4", *options]) == 0
    said = capsys.readouterr().err
    # Counts are of the whole process, other tests included.
    assert re.search(r"experts: [\d.]+% of [\d,]+ visits .* [\d.]+ [KMG]B read", said)


def test_memory_stays_under_the_limit(tmp_path: Path) -> None:
    fields = SMALL | {
        "model_type": "deepseek_v2",
        "hidden_size": 512,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 32,
    }
    made = CausalLM(read_config(fields))
    initialise(made, seed=0)
    save_weights(made, tmp_path / "wide", dtype=torch.bfloat16)
    del made
    script = """
import json, sys, torch
from moescope.kernels import cpu
from moescope.native.pack_cache import load_packed
from moescope.checkpoint import open_checkpoint

def held():
    rows = dict(line.split(":") for line in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) * 1024

cpu.limit_experts(12 << 20)
source = open_checkpoint(__import__("pathlib").Path(sys.argv[1]))
for _ in range(2):
    model, pack = load_packed(source, torch.bfloat16, "bf16", stream_experts=True)
before = held()
with torch.inference_mode():
    for seed in range(4):
        torch.manual_seed(seed)
        model(torch.randint(320, (1, 64)))
counts = cpu.expert_counts()
print(json.dumps([held() - before, counts.bytes_read, counts.held]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "wide")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, read, kept = json.loads(done.stdout)
    assert kept <= 12 << 20
    assert read > 150 << 20  # all experts of both layers, more than once
    assert grown < (12 << 20) + (24 << 20)
